"""Every command that reads run folders refuses one with a pickle that would run a command."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mae_scale.config.identity import as_yaml
from mae_scale.config.parsing import parse
from mae_scale.errors import UserError
from mae_scale.inference import predict
from mae_scale.inference.model import read_model
from mae_scale.tasks.task import TASKS
from mae_scale.tasks.trained import TrainedRun, read_any
from mae_scale.train import elastic, loading
from mae_scale.train.checkpoint import Commit, checkpoint_damage
from mae_scale.train.reading import load_tensors

MODEL, STATES = "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"


class Bomb:
    """An object that writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch '{self.mark}'",)


def poisoned(folder: Path, task: str, stage: int, name: str) -> Path:
    """Make a run folder, in whose checkpoint the file of this name runs a command."""
    run = folder / "run"
    step = run / "checkpoints" / "step-00000003"
    step.mkdir(parents=True)
    arguments = [f"--run_dir={run}", "--data.train=x", "--model.name=mae_vit_tiny_patch16"]
    (run / "config.yaml").write_text(as_yaml(parse(TASKS[task].config, arguments, "x")))
    (run / "classes.json").write_text('["a", "b"]')
    good = {"module": {"cls_token": torch.ones(1, 1, 192)}, "buffer_names": []}
    files = {}
    for part in (MODEL, STATES):
        content = {**good, "optimizer": Bomb(folder / "mark")} if part == name else good
        torch.save(content, step / part)
        data = (step / part).read_bytes()
        files[part] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    commit = Commit(3, 24, 1, stage, "fp32", "", "", False, 0, files)
    (step / "COMMITTED.json").write_text(json.dumps(commit.__dict__))
    assert checkpoint_damage(step) is None
    return run


def step_of(run: Path) -> Path:
    return run / "checkpoints" / "step-00000003"


def options(run: Path) -> argparse.Namespace:
    none = dict.fromkeys(("img_size", "model", "classes"))
    return argparse.Namespace(weights=run, ema=False, top=5, score=0.5, **none)


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "reconstruct": ("pretrain", lambda run: read_model(step_of(run), "autoencoder")),
    "weights of pretrain and finetune": ("pretrain", read_any),
    "features and knn": ("pretrain", lambda run: read_model(run, "encoder")),
    "evaluate": ("finetune", lambda run: read_model(run, "classifier")),
    "predict": ("finetune", lambda run: predict.load(options(run), torch.device("cpu"))),
    "export": (
        "finetune",
        lambda run: TrainedRun.read(step_of(run)).whole_weights(),
    ),
}


@pytest.mark.parametrize("name", READERS)
def test_commands_refuse_it(tmp_path: Path, name: str) -> None:
    task, read = READERS[name]
    run = poisoned(tmp_path, task, 1, MODEL)
    with pytest.raises(UserError, match=r"posix\.system.*--trust-pickle") as refusal:
        read(run)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("part", [MODEL, STATES])
@pytest.mark.parametrize("stage", [1, 3])
def test_a_resume_refuses_it(tmp_path: Path, stage: int, part: str) -> None:
    step = step_of(poisoned(tmp_path, "pretrain", stage, part))
    for read in (
        lambda: loading._load_as_it_is(None, step),  # type: ignore[arg-type]  # never gets so far
        lambda: elastic.convert(step, stage, ["cls_token"]),
    ):
        with pytest.raises(UserError, match=r"posix\.system"):
            read()
    assert not (tmp_path / "mark").exists()


def test_what_a_conversion_left_behind_is_no_way_in(tmp_path: Path) -> None:
    run = poisoned(tmp_path, "pretrain", 1, "")
    universal = step_of(run) / "universal"
    for path in (universal / "common.pt", universal / "zero" / "cls_token" / "fp32.pt"):
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"param": Bomb(tmp_path / "mark")}, path)
        with pytest.raises(UserError, match=r"posix\.system"):
            load_tensors(path)
    with pytest.raises(UserError, match=r"posix\.system"):
        elastic.load(None, universal)  # type: ignore[arg-type]  # never gets so far
    assert not (tmp_path / "mark").exists()
