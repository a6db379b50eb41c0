"""The names that `mae_scale` offers in Python, such as in a notebook."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

import mae_scale
from mae_scale.cli import main
from mae_scale.errors import UserError

TINY = {"img_size": 32, "patch_size": 8, "depth": 1, "decoder_depth": 1}


@pytest.mark.parametrize("kind", [str, Path])
def test_folders_are_taken_as_text_or_path(shards: Path, kind: type) -> None:
    folder = kind(shards)
    opened = mae_scale.open_shards(folder)
    batch = next(iter(mae_scale.TrainLoader(folder, img_size=32, global_batch_size=4)))
    again = next(iter(mae_scale.TrainLoader(opened, img_size=32, global_batch_size=4)))
    assert torch.equal(batch["image"], again["image"])
    assert next(iter(mae_scale.EvalLoader(folder, img_size=32, batch_size=3)))["label"].shape == (
        3,
    )
    assert len(mae_scale.ShardDataset(folder)) == len(opened)


def test_shards_are_shown_on_one_line(shards: Path) -> None:
    text = repr(mae_scale.open_shards(shards))
    assert "\n" not in text and len(text) < 250
    assert f"{shards}" in text and "250 samples of 250 classes" in text


@pytest.mark.parametrize("kind", [str, Path])
def test_weights_are_read_from_files_and_folders(tmp_path: Path, kind: type) -> None:
    model = mae_scale.build_mae("mae_vit_tiny_patch16", **TINY)
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    for place in (tmp_path, tmp_path / "model.pth"):
        state = mae_scale.read_weights(kind(place))
        assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    with pytest.raises(UserError, match="there is no file or folder"):
        mae_scale.read_weights(kind(tmp_path / "other"))


@pytest.mark.parametrize("sampling", ["random", "block", "grid"])
def test_a_model_draws_its_noise_itself(sampling: str) -> None:
    model = mae_scale.build_mae("mae_vit_tiny_patch16", mask_sampling=sampling, **TINY)
    images = torch.randn(3, 3, 32, 32)
    torch.manual_seed(1)
    loss, _, mask = model(images)
    torch.manual_seed(1)
    assert torch.equal(mask, model(images)[2])
    assert loss.isfinite() and mask.sum(1).tolist() == [12, 12, 12]
    if sampling != "grid":
        assert not torch.equal(mask, model(images)[2])
    picture, pixels = model.reconstruct(images)
    assert picture.shape == images.shape and pixels.mean() == 0.75


def test_status_writes_into_a_notebook(tmp_path: Path) -> None:
    """A notebook's stdout, like a StringIO, cannot be reconfigured."""
    (tmp_path / "config.yaml").write_text("run_dir: x\n")
    with redirect_stdout(io.StringIO()) as shown:
        code = main(["status", str(tmp_path)])
    assert code == 0 and "not started" in shown.getvalue()


def test_a_command_gives_its_exit_code(tmp_path: Path) -> None:
    assert main(["status", str(tmp_path)]) == 2
