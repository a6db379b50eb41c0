"""Help texts and mistyped options are answered before anything slow is imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mae_scale.cli import COMMANDS, main
from mae_scale.tasks.task import TASKS

SLOW = ("torch", "timm", "deepspeed", "matplotlib", "torchvision")
PROGRAM = f"""
import contextlib, io, sys
from mae_scale.cli import main
try:
    with contextlib.redirect_stdout(io.StringIO()):
        code = main(sys.argv[1:])
except SystemExit as end:
    code = end.code
slow = [name for name in {SLOW} if name in sys.modules]
print(code, *slow)
"""


def answer(*arguments: str) -> tuple[str, str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip(), done.stderr


@pytest.mark.parametrize("command", [*TASKS, *COMMANDS])
def test_help_imports_nothing_slow(command: str) -> None:
    assert answer(command, "--help")[0] == "0"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["pretrian"], "did you mean 'pretrain'?"),
        (["pretrain", "--train.epoch", "3"], "did you mean 'train.epochs'?"),
        (["plan", "--gpus", "8", "--gpu", "A1000"], "did you mean 'A1"),
        (["plan", "--gpus", "8", "--train.epoch", "3"], "did you mean 'train.epochs'?"),
        (["plan", "--gpus", "8", "--config", "pretrain_vit_bas"], "did you mean 'pretrain_vit_"),
        (["evaluate", "run", "--img_sise", "3"], "did you mean '--img_size'?"),
        (["evaluate", "run", "--batch-size", "3"], "did you mean '--batch_size'?"),
        (["report", "run", "--output", "x"], "did you mean '--out'?"),
        (["plan", "--gpus", "8", "--gpu", "A100"], "did you mean 'A100-40GB' or 'A100-80GB'?"),
        (["plan", "--gpus", "8", "--lr", "3"], "did you mean 'optim.base_lr'?"),
        (["pretrain", "train.epochs=3"], "did you mean --train.epochs=3?"),
        (["pretrain"], "are required: --run_dir, --data.train; mae-scale pretrain --help"),
        (["pretrain", "--run_dir"], "--run_dir needs a value"),
        (["pretrain", "--config"], "the name of a recipe"),
        (["export", "run", "out", "--to", "tim"], "--to"),
        (["reconstruct", "run"], "images"),
        (["features", "run", "shards", "--out", "x.csv"], "must end in .npy or .parquet"),
        (["attention", "run", "a.jpg", "--out", "a.jpg"], "must end in .png"),
        (["predict", "run", "a.jpg", "--score", "2"], "--score: 2 must be from 0 to 1"),
        (["predict", "run", "--top", "0", "a.jpg"], "--top: 0 must be at least 1"),
        (["evaluate", "run", "--batch_size", "x"], "x must be a whole number, at least 1"),
        (["knn", "run", "s", "--crop_ratio", "0"], "0 must be from 0 to 1, 0 excluded"),
        (["reconstruct", "run", "a.jpg", "--mask_ratio", "nan"], "nan must be from 0 to 1"),
    ],
)
def test_a_typo_is_answered_before_slow_imports(arguments: list[str], says: str) -> None:
    code, error = answer(*arguments)
    assert code == "2"
    assert says in error
    assert error.count("\n") == 1


def test_nothing_to_do_shows_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in [*TASKS, *COMMANDS])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["evaluate", "", "val=x"], "at the end of 'mae-scale evaluate' is empty"),
        (["evaluate", "run", "--out="], "at the end of 'mae-scale evaluate run --out=' is empty"),
        (["pretrain", "--run_dir", "", "--data.train=x"], '"run_dir": the text is empty'),
        (["finetune", "--run_dir=r", "--data.train=x", "--weights="], '"weights": the text is'),
        (["plan", "--config", ""], "at the end of 'mae-scale plan --config' is empty"),
    ],
)
def test_a_variable_of_the_shell_that_is_not_set(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """An empty path would be the working folder, and empty weights would be random ones."""
    assert main(arguments) == 2
    assert says in capsys.readouterr().err
