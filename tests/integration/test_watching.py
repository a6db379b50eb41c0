"""Pictures and traces that a run makes while it trains do not change its training."""

from __future__ import annotations

import gzip
import json
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import Run, ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mae_scale.cli import main
from mae_scale.data.dataset import EvalDataset
from mae_scale.data.reader import shard_cache
from mae_scale.data.shards import open_shards
from mae_scale.data.transforms import denormalize, normalize
from mae_scale.inference.model import read_model
from mae_scale.models.masking import mask_noise
from mae_scale.tasks.first_batch import FIRST_BATCH
from mae_scale.tasks.pictures import IMAGES, fixed_images

DRAWS = {"train.reconstruct_every": 2, "train.max_steps": 5, "train.profile": "3-4"}


def trace(run: Run, rank: int) -> list[str]:
    """Give the names of those events in a rank's trace that this program labels."""
    path = run.run_dir / "profile" / f"steps-3-4-rank-{rank}.json.gz"
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    own = [e for e in events if e.get("cat") == "user_annotation"]
    return [e["name"] for e in sorted(own, key=lambda e: e["ts"])]


@pytest.mark.parametrize("stage", [1, 3])
def test_pictures_and_traces_do_not_touch_the_training(
    run: Run, tmp_path: Path, stage: int
) -> None:
    """This holds for a run that is stopped and resumed, too."""
    settings = {"deepspeed": f"zero{stage}", "train.max_steps": 5}
    run = replace(run, launcher="torchrun", processes=2, settings=settings)
    run.finish()
    assert not (run.run_dir / "reconstructions").exists()
    assert not (run.run_dir / "profile").exists()
    watched = replace(run, run_dir=tmp_path / "watched", settings=settings | DRAWS)

    def terminate_one_rank(process: subprocess.Popen[str]) -> None:
        ranks(process)[1].terminate()

    watched.stop(1, terminate_one_rank, 1)
    assert 1 <= len(watched.rows()) < 5
    watched.finish()
    assert watched.rows() == run.rows()
    with Image.open(run.run_dir / FIRST_BATCH) as picture:
        assert (np.asarray(picture) == 128).all(axis=-1).mean() > 0.1  # the hidden patches
    pictures = sorted(p.name for p in (watched.run_dir / "reconstructions").iterdir())
    assert pictures == ["step-00000002.png", "step-00000004.png", "step-00000005.png"]
    board = EventAccumulator(str(watched.run_dir / "tensorboard")).Reload()
    assert [event.step for event in board.Images("reconstructions")] == [2, 4, 5]


def test_a_picture_shows_what_the_weights_of_its_step_make(run: Run) -> None:
    """The run uses ZeRO-3 in bf16, so its weights are gathered for the picture."""
    settings = DRAWS | {"deepspeed": "zero3", "train.precision": "bf16"}
    run = replace(run, launcher="torchrun", processes=2, settings=settings)
    run.finish()
    model = read_model(run.run_dir / "checkpoints" / "step-00000005", "autoencoder").model
    sample, pixels = fixed_images(EvalDataset(open_shards(run.shards), 32, 1.0))
    assert sample.tolist() == [i * 250 // IMAGES for i in range(IMAGES)]
    noise = mask_noise(0, torch.zeros_like(sample), sample, model.num_patches)
    expected, _ = model.reconstruct(normalize(pixels), noise)
    assert expected.std() > 0.1
    with Image.open(run.run_dir / "reconstructions" / "step-00000005.png") as picture:
        drawn = np.asarray(picture.convert("RGB"))
    first = (denormalize(expected)[0] * 255).round().permute(1, 2, 0).numpy()
    top, left, zoom = 92, 16 + 2 * (160 + 6), 5  # place of the third tile
    tile = drawn[top : top + 160 : zoom, left : left + 160 : zoom]
    assert np.abs(tile - first).mean() < 3  # of 255 levels; bf16 rounds
    for rank in range(2):
        labels = trace(run, rank)
        assert [name for name in labels if name.startswith("step ")] == ["step 3", "step 4"]
        assert {"data wait", "forward", "backward", "optimizer step"} <= set(labels)


def test_a_damaged_image_gives_its_place_to_the_next(shards: Path) -> None:
    dataset = EvalDataset(open_shards(shards), 32, 1.0)
    damaged = dataset.shards.checksums.copy()
    damaged[[0, 1, 31]] ^= 1
    dataset.shards.__dict__["checksums"] = damaged
    sample, pixels = fixed_images(dataset)
    assert sample.tolist() == [2, 32, *(i * 250 // IMAGES for i in range(2, IMAGES))]
    assert pixels.shape == (IMAGES, 3, 32, 32) and pixels.float().std() > 10
    damaged[:] ^= 1
    damaged[[0, 1, 31]] ^= 1
    sample, pixels = fixed_images(dataset)
    assert len(sample) == len(pixels) == 0


def test_a_run_stopped_inside_of_the_trace_writes_none(run: Run) -> None:
    run.settings = {"train.profile": "2-100000", "train.epochs": 100000}
    process = run.start()
    while len(run.rows()) < 3 and process.poll() is None:
        time.sleep(0.02)
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 85 and "Traceback" not in output, output
    assert not (run.run_dir / "profile").exists()


@pytest.mark.parametrize("steps", ["12", "0-3", "9-7", "a-b", "3-", "-3"])
def test_steps_that_are_no_range_are_refused(
    run: Run, steps: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run.settings = {"train.profile": steps}
    assert main(run.command()[3:]) == 2
    message = capsys.readouterr().err.splitlines()[-1]  # after the summary of the run
    assert f"mae-scale: error: train.profile '{steps}' must be START-STOP" in message
    assert not run.run_dir.exists()


def test_shards_that_cannot_be_read_cost_the_pictures_and_not_the_run(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(sample: int) -> torch.Tensor:
        raise OSError("the shard is gone")

    dataset = EvalDataset(open_shards(shards), 32, 1.0)
    monkeypatch.setattr(dataset, "pixels", read)
    sample, pixels = fixed_images(dataset)
    assert len(sample) == 0 and pixels.shape == (0, 3, 32, 32)


def test_images_of_remote_shards_lie_in_the_first_one(shards: Path, tmp_path: Path) -> None:
    """Therefore only one remote shard is fetched for them."""
    link = tmp_path / "remote"
    link.symlink_to(shards)
    remote = open_shards(f"pipe:cat {link}/{{}}", tmp_path / "cache")
    cache = shard_cache(remote, tmp_path / "cache", None)
    sample, pixels = fixed_images(EvalDataset(remote, 32, 1.0, cache))
    assert sample.tolist() == [i * 40 // IMAGES for i in range(IMAGES)]
    assert len(list((tmp_path / "cache").rglob("*.tar"))) == 1
    local = EvalDataset(open_shards(shards), 32, 1.0)
    assert torch.equal(pixels, torch.stack([local.pixels(i) for i in sample.tolist()]))
