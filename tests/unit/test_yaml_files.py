"""YAML that stands for too much, holds itself, or is no value ends in one line, at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from mae_scale.cli import main
from mae_scale.config.yaml_files import parse_yaml
from mae_scale.errors import UserError
from mae_scale.tasks.trained import TrainedRun

MERGES = "a0: &a0 {" + ", ".join(f"k{i}: 1" for i in range(9)) + "}\n"
MERGES += "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 12))
LISTS = "a0: &a0 [1, 2, 3, 4, 5, 6, 7, 8, 9]\n"
LISTS += "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("text", "says"),
    [
        (MERGES, "stands for more than 100,000 values"),
        (LISTS, "stands for more than 100,000 values"),
        ("a: &a [*a]", "'a' holds itself"),
        ("a: &a {<<: *a}", "'a' holds itself"),
        ("[" * 100_000, "nested more than 30 levels deep"),
        ("a: !!python/object/apply:os.system [x]", "could not determine a constructor"),
        ("a: \x07", "special characters are not allowed"),
        ("a: !!int ''", ""),
        ("a: !!bool maybe", ""),
        ("? [a]\n: 1", "unhashable"),
    ],
)
def test_it_is_refused(text: str, says: str) -> None:
    with pytest.raises(ValueError) as error:
        parse_yaml(text)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_people_may_use_anchors_and_runs_do_not() -> None:
    text = "base: &b {x: 1}\nrow: {<<: *b, y: 2}\n"
    assert parse_yaml(text)["row"] == {"x": 1, "y": 2}
    for written in (text, "a: &b 1", "a: {<<: {b: 1}}"):
        with pytest.raises(ValueError, match="which no run writes"):
            parse_yaml(written, of_a_run=True)


def test_dates_are_texts_and_a_leading_zero_is_not_octal() -> None:
    found = parse_yaml("a: 2026-12-01\nb: 010\nc: 0x10\nd: 1:30\n")
    assert found == {"a": "2026-12-01", "b": "010", "c": 16, "d": "1:30"}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("command", ["status", "report", "sweep", "pretrain"])
def test_commands_answer_a_bomb(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(MERGES)
    data = ["--data.train=x", "--run_dir", str(tmp_path / "out")]
    arguments = {
        "sweep": [str(run / "config.yaml"), *data, "--data.val=x"],
        "pretrain": [f"--config={run / 'config.yaml'}", *data],
    }.get(command, [str(run)])
    assert main([command, *arguments]) in (1, 2)
    error = capsys.readouterr().err
    assert "which no run writes" in error or "stands for more than" in error, error
    assert error.count("\n") == 1


@pytest.mark.timeout(60)
def test_a_trained_run_is_not_read_with_a_bomb(tmp_path: Path) -> None:
    """As `reconstruct`, `evaluate` and `export` read it."""
    (tmp_path / "config.yaml").write_text(MERGES)
    with pytest.raises(UserError, match="which no run writes"):
        TrainedRun.read(tmp_path / "checkpoints" / "step-00000001")
