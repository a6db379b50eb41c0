"""Checkpoints as files: what damages one, which is taken, what is never removed."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from mae_scale.errors import RunError, UserError
from mae_scale.train.checkpoint import (
    COMMITTED,
    Commit,
    _prune,
    checkpoint_damage,
    newest_intact,
    refuse_lost,
    set_aside_all,
    set_aside_newer,
)
from mae_scale.train.run_dir import Place, add_history, open_run
from mae_scale.train.sinks import Rows


def committed(run_dir: Path, step: int, content: bytes = b"weights") -> Path:
    """Make a step folder as `Saver` leaves it."""
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "state.pt").write_bytes(content)
    facts = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    Commit(
        step=step, samples=step, world_size=1, zero_stage=0, precision="fp32",
        config_hash="ours", data="", milestone=False, bad_steps=0, files={"state.pt": facts},
        score=83.4,
    ).write(folder)  # fmt: skip
    return folder


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda f: (f / "state.pt").unlink(), "state.pt is missing"),
        (lambda f: (f / "state.pt").write_bytes(b""), "has 0 bytes instead of 7"),
        (lambda f: (f / "state.pt").write_bytes(b"wEights"), "does not match its checksum"),
        (lambda f: (f / "COMMITTED.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "COMMITTED.json").write_text('{"step": 3}'), "cannot be read"),
        (lambda f: f.rename(f.with_name("step-00000009")), "is of step 3"),
    ],
)
def test_damage_is_found_and_the_one_before_taken(tmp_path: Path, harm, says: str) -> None:  # type: ignore[no-untyped-def]
    before, newest = committed(tmp_path, 2), committed(tmp_path, 3)
    assert checkpoint_damage(newest) is None and newest_intact(tmp_path, "ours") == newest
    harm(newest)
    found = next(f for f in (newest, newest.with_name("step-00000009")) if f.exists())
    assert says in (checkpoint_damage(found) or "")
    assert newest_intact(tmp_path, "ours") == before


def test_each_flipped_byte_of_a_commit_is_noticed(tmp_path: Path) -> None:
    path = committed(tmp_path, 2) / COMMITTED
    content = path.read_bytes()
    for place in range(len(content)):
        for bit in range(8):
            flipped = bytearray(content)
            flipped[place] ^= 1 << bit
            path.write_bytes(flipped)
            assert checkpoint_damage(path.parent) is not None, (place, bit)
    path.write_bytes(content[:-1])
    assert checkpoint_damage(path.parent) is not None


def test_a_commit_of_an_older_version_has_no_checksum(tmp_path: Path) -> None:
    path = committed(tmp_path, 2) / COMMITTED
    lines = path.read_text().splitlines()
    assert '"sha256"' in lines[-2]
    lines[-3] = lines[-3].removesuffix(",")
    path.write_text("\n".join([*lines[:-2], "}\n"]))
    assert newest_intact(tmp_path, "ours") == path.parent


def test_a_commit_of_another_run_and_an_unfinished_save_do_not_count(tmp_path: Path) -> None:
    folder = committed(tmp_path, 2)
    assert checkpoint_damage(folder, "another") == "COMMITTED.json belongs to another run"
    (tmp_path / "checkpoints" / "step-00000005").mkdir()
    assert newest_intact(tmp_path) == folder
    assert newest_intact(tmp_path, "another") is None
    with pytest.raises(UserError, match=r"step-00000002: COMMITTED\.json belongs to another run"):
        refuse_lost(tmp_path, "another")


@pytest.mark.parametrize(
    "take_away",
    [
        lambda folder: folder.rename(folder.with_name("elsewhere")),
        lambda folder: [step.rename(folder.parent / step.name) for step in folder.iterdir()],
        lambda folder: [(step / COMMITTED).unlink() for step in folder.iterdir()],
        lambda folder: (
            folder.rename(folder.with_name("unmounted")),
            folder.symlink_to(folder.with_name("disk")),
        ),
    ],
)
def test_lost_checkpoints_are_no_reason_to_begin_again(tmp_path: Path, take_away) -> None:  # type: ignore[no-untyped-def]
    add_history(tmp_path, "started", 0)
    refuse_lost(tmp_path, "ours")  # a start that was killed before its first save
    committed(tmp_path, 2)
    add_history(tmp_path, "saved", 2)
    take_away(tmp_path / "checkpoints")
    with pytest.raises(UserError, match="--start_over true"):
        refuse_lost(tmp_path, "ours")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    set_aside_all(tmp_path)
    (aside,) = tmp_path.glob("before-*")
    assert (aside / "metrics.jsonl").read_text() == '{"step": 1}\n'
    refuse_lost(tmp_path, "ours")


def test_nothing_damaged_or_linked_is_pruned(tmp_path: Path) -> None:
    disk = tmp_path / "another disk"
    moved = committed(tmp_path, 1)
    moved.rename(disk)
    moved.symlink_to(disk)
    intact, damaged = committed(tmp_path, 2), committed(tmp_path, 3)
    (damaged / "state.pt").unlink()
    set_aside_newer(tmp_path, intact)
    for step in (3, 4):
        committed(tmp_path, step)
        _prune(tmp_path, keep=1)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names[0].startswith("damaged-step-00000003-")
    assert names[1:] == ["step-00000001", "step-00000004"]
    assert (disk / "state.pt").exists()


def test_a_file_is_not_written_through_a_link(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("years of work")
    (tmp_path / "metrics.jsonl").symlink_to(precious)
    with pytest.raises(OSError, match="it is a link"):
        Rows(tmp_path / "metrics.jsonl", 0)
    assert precious.read_text() == "years of work"


def test_rows_continue_in_a_new_file_where_theirs_was_removed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3}\n{"step": 1, "loss": 2}\n{"step": 3}\n')
    rows = Rows(path, 2)
    assert path.read_text() == '{"step": 1, "loss": 3}\n'
    rows.write({"step": 2})
    path.unlink()
    rows.write({"step": 3})
    rows.close()
    assert path.read_text() == '{"step": 3}\n'


def test_a_run_notices_that_its_folder_is_another_one(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    place = Place(folder)
    place.check()
    folder.rename(tmp_path / "renamed")
    with pytest.raises(RunError, match="no longer the folder"):
        place.check()
    folder.mkdir()
    with pytest.raises(RunError, match="no longer the folder"):
        place.check()
    assert not list(folder.iterdir())


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", "checkpoints"])
def test_a_run_refuses_a_link_in_its_folder(tmp_path: Path, name: str) -> None:
    precious = tmp_path / "precious"
    precious.write_text("years of work")
    run = tmp_path / "run"
    run.mkdir()
    (run / name).symlink_to(precious)
    with pytest.raises(UserError, match=rf"{name} is a link|is no run folder"):
        open_run(run, None)
    assert precious.read_text() == "years of work"
