"""`mae-scale reconstruct` on runs of every ZeRO stage, and images of any size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import Run

from mae_scale.cli import main
from mae_scale.inference.model import read_model
from mae_scale.train.checkpoint import find_checkpoint


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> dict[int, Path]:
    """Train one step under ZeRO 1 and 3 on two processes: equal weights, sharded differently."""
    folder = tmp_path_factory.mktemp("trained")
    runs = {}
    for stage in (1, 3):
        settings = {"train.max_steps": 2, "deepspeed": f"zero{stage}"}
        run = Run(folder / f"zero{stage}", shards, settings, launcher="torchrun", processes=2)
        run.finish()
        runs[stage] = run.run_dir
    return runs


def test_weights_come_out_of_every_stage_whole(trained: dict[int, Path]) -> None:
    one, three = (
        read_model(find_checkpoint(trained[s]), "autoencoder").model.state_dict() for s in (1, 3)
    )
    assert one.keys() == three.keys() and "decoder_pos_embed" in one
    for key, value in one.items():
        torch.testing.assert_close(value, three[key], rtol=1e-5, atol=1e-6)
    assert one["pos_embed"].abs().sum() > 0


def test_writes_the_grid(trained: dict[int, Path], imagenet_tree: Path, tmp_path: Path) -> None:
    folder = tmp_path / "my images"
    folder.mkdir()
    with Image.open(next(imagenet_tree.rglob("*.JPEG"))) as photograph:
        photograph.convert("L").resize((50, 300)).save(folder / "tall grey.png")
        photograph.resize((700, 31)).save(folder / "flat, not UTF-8 \udcff.JPG")
        photograph.convert("CMYK").resize((20, 20)).save(folder / "small cmyk.jpeg")
    out = tmp_path / "new folder" / "grid.png"
    step = trained[3] / "checkpoints" / "step-00000002"
    assert main(["reconstruct", str(step), str(folder), "--out", str(out)]) == 0
    with Image.open(out) as grid:
        pixels = np.asarray(grid.convert("RGB"))
    assert pixels.shape[1] > 4 * 160 and pixels.shape[0] > 3 * 160
    again = tmp_path / "again.png"
    assert main(["reconstruct", str(step), str(folder), "--out", str(again)]) == 0
    assert again.read_bytes() == out.read_bytes()
    other = ["--seed", "1", "--mask_ratio", "0.5"]
    assert main(["reconstruct", str(step), str(folder), "--out", str(again), *other]) == 0
    assert again.read_bytes() != out.read_bytes()


def test_a_damaged_step_folder_is_refused(
    trained: dict[int, Path], imagenet_tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step = trained[1] / "checkpoints" / "step-00000002"
    (step / "mp_rank_00_model_states.pt").write_bytes(b"")
    assert main(["reconstruct", str(step), str(imagenet_tree)]) == 2
    assert "is damaged: mp_rank_00_model_states.pt has 0 bytes" in capsys.readouterr().err
