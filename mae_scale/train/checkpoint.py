"""Checkpoints: the files of DeepSpeed, and COMMITTED.json, written last, which makes them valid.

Readers ignore a folder `RUN/checkpoints/step-00001234/` without a COMMITTED.json. So a save that
was cut short at any moment leaves nothing behind that could be mistaken for a checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mae_scale.config.sections import CheckpointConfig
from mae_scale.errors import RunError, UserError
from mae_scale.files import digest_of, read_file, remove_tree, sync_folder, write_atomically
from mae_scale.launch.distributed import World, gather_to_all, on_rank0
from mae_scale.train.checkpoint_writer import BackgroundWriter
from mae_scale.train.ds import DeepSpeedEngine
from mae_scale.train.records import HISTORY, METRICS, VALIDATION
from mae_scale.train.run_dir import Place, add_history, read_history

log = logging.getLogger("mae_scale")

COMMITTED = "COMMITTED.json"
SAVED = "saved"  # event in the run's history: its first checkpoint is committed
CHECKSUM = "sha256"  # key of that file, with the SHA-256 of its other entries
_MOST_BYTES = 1 << 24  # largest size of that file; it names a file or two for each rank


@dataclass
class Commit:
    """The content of COMMITTED.json."""

    step: int
    """Number of optimiser steps done."""
    samples: int
    """Number of images seen."""
    world_size: int
    """Number of processes that saved it."""
    zero_stage: int
    """ZeRO stage, 0 to 3."""
    precision: str
    """Precision of the arithmetic, "bf16" or "fp32"."""
    config_hash: str
    """`config.identity.identity_hash` of the run; a checkpoint with another hash is not read."""
    data: str
    """Fingerprint of the training shards' manifest."""
    milestone: bool
    """Whether the checkpoint is kept for good."""
    bad_steps: int
    """Number of steps that were not applied because the loss or gradient was not finite."""
    files: dict[str, dict[str, Any]]
    """Size in bytes and SHA-256 of each file."""
    score: float | None = None
    """Score by which the best checkpoint is chosen; None where this step was not validated."""
    layout: str | None = None
    """`deepspeed_state.layout` of the engine that saved it; None in checkpoints older than it."""

    @classmethod
    def read(cls, folder: Path) -> Commit:
        """Read the COMMITTED.json of a step folder.

        Raises:
            OSError: the file cannot be read.
            ValueError: the file does not hold a commit, or a byte of it has changed.
        """
        text = read_file(folder / COMMITTED, _MOST_BYTES)
        try:
            facts = json.loads(text)
            checked = facts.pop(CHECKSUM, None) is not None  # older versions wrote no checksum
            commit = cls(**facts)
        except (TypeError, AttributeError, RecursionError) as error:
            raise ValueError(str(error)) from None
        commit._check()
        if checked and commit.text().encode() != text:
            raise ValueError("it does not match its own checksum")
        return commit

    def text(self) -> str:
        """Return the content of COMMITTED.json: JSON that ends with a SHA-256 of the rest."""
        facts = json.dumps(asdict(self), indent=1)
        sha256 = hashlib.sha256(facts.encode()).hexdigest()
        return f'{facts.removesuffix(chr(10) + "}")},\n "{CHECKSUM}": "{sha256}"\n}}\n'

    def write(self, folder: Path) -> None:
        """Write the COMMITTED.json of a step folder; the checkpoint is valid from then on."""
        write_atomically(folder / COMMITTED, self.text())

    def _check(self) -> None:
        """Raise a `ValueError` for a value that this program would not have written."""
        whole = {"step": 0, "samples": 0, "bad_steps": 0, "world_size": 1, "zero_stage": 0}
        for name, least in whole.items():
            value = getattr(self, name)
            if type(value) is not int or not least <= value < 2**63:
                raise ValueError(f"{name} is {value!r:.40}")
        for name in ("precision", "config_hash", "data"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} is {getattr(self, name)!r:.40}")
        is_score = type(self.score) in (int, float) and abs(self.score or 0) < 1e9
        if self.score is not None and not is_score:
            raise ValueError(f"score is {self.score!r:.40}")
        if not isinstance(self.files, dict):
            raise ValueError(f"files is {self.files!r:.40}")
        for name, facts in self.files.items():
            if Path(name).name != name or not isinstance(facts, dict) or "bytes" not in facts:
                raise ValueError(f"files names {name!r:.80}, which is no file of a checkpoint")


def folder_of(run_dir: Path, step: int) -> Path:
    """Return the folder of a step, such as `RUN/checkpoints/step-00001234`."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def _folders(run_dir: Path) -> list[Path]:
    """List all step folders, committed or not, newest first."""
    found = (run_dir / "checkpoints").glob("step-*")
    return sorted((p for p in found if re.fullmatch(r"step-\d+", p.name)), reverse=True)


def _file_facts(path: Path) -> dict[str, Any]:
    digest = digest_of(path)
    return {"bytes": digest.bytes, "sha256": digest.sha256}


def checkpoint_damage(folder: Path, config_hash: str | None = None) -> str | None:
    """Describe what is wrong with a committed checkpoint; return None if it is intact.

    Args:
        folder: step folder with a COMMITTED.json.
        config_hash: identity hash of the run it must belong to; None accepts any run.
    """
    try:
        commit = Commit.read(folder)
    except (OSError, ValueError) as error:
        return f"{COMMITTED} cannot be read ({error})"
    if config_hash is not None and commit.config_hash != config_hash:
        return f"{COMMITTED} belongs to another run"
    if folder.name != f"step-{commit.step:08d}":
        return f"{COMMITTED} is of step {commit.step}"
    for name, expected in commit.files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
        if _file_facts(path) != expected:
            return f"{name} does not match its checksum"
    return None


def exists(run_dir: Path) -> bool:
    """Return whether the run has a committed checkpoint, intact or not."""
    return any(_claims(folder) for folder in _folders(run_dir))


def newest_intact(
    run_dir: Path, config_hash: str | None = None, last: int | None = None
) -> Path | None:
    """Find the newest committed checkpoint that is intact; a warning names each damaged one.

    Args:
        run_dir: folder of the run.
        config_hash: identity hash of the run it must belong to; None accepts any run.
        last: highest step to look at; None: all steps.
    """
    for folder in _folders(run_dir):
        if not _claims(folder) or (last is not None and _step_of(folder) > last):
            continue
        wrong = checkpoint_damage(folder, config_hash)
        if wrong is None:
            return folder
        log.warning("checkpoint %s is damaged and passed over: %s", folder, wrong)
    return None


def _claims(folder: Path) -> bool:
    """Return whether a step folder has a COMMITTED.json, readable or not."""
    return os.path.lexists(folder / COMMITTED)


def set_aside_newer(run_dir: Path, newest: Path) -> None:
    """Rename the folders of the damaged checkpoints after `newest`; nothing removes them later."""
    for folder in _folders(run_dir):
        if folder == newest:
            break
        if _claims(folder):
            folder.rename(folder.with_name(f"damaged-{folder.name}-{time.time_ns()}"))


def refuse_lost(run_dir: Path, config_hash: str) -> None:
    """Refuse to begin at step 0 in the folder of a run whose checkpoints cannot be used.

    Raises:
        UserError: the run has saved a checkpoint before, and no usable one is left.
    """
    place = run_dir / "checkpoints"
    wrong = [
        f"{folder.name}: {checkpoint_damage(folder, config_hash)}"
        for folder in _folders(run_dir)
        if _claims(folder)
    ]
    saved = any(row["step"] > 0 for row in read_history(run_dir))
    if not wrong and not saved:
        return
    if not wrong:
        there = place.is_dir() and any(place.iterdir())
        wrong = [f"{place} {'holds no committed checkpoint' if there else 'is gone or empty'}"]
    raise UserError(
        f"{run_dir} has been trained, but no checkpoint in it can be used ({'; '.join(wrong)}); "
        "bring one back, or begin at step 0 with --start_over true, which sets aside what is there"
    )


def set_aside_all(run_dir: Path) -> None:
    """Move checkpoints and records of a run, which starts over, into a folder of their own."""
    found = [run_dir / name for name in ("checkpoints", METRICS, VALIDATION, HISTORY)]
    found = [path for path in found if os.path.lexists(path)]
    if not found:
        return
    aside = run_dir / f"before-{datetime.now(UTC):%Y%m%d-%H%M%S-%f}"
    aside.mkdir()
    for path in found:
        path.rename(aside / path.name)
    log.warning("starting over at step 0; what was there lies in %s", aside)


class Saver:
    """Saves checkpoints, one at a time; one is committed when all ranks have written their files.

    `start` and `finish` are called by all ranks.

    Args:
        engine: engine whose state is saved.
        run_dir: folder of the run.
        world: processes of the run.
        config: section `checkpoint` of the recipe. Its `keep` newest checkpoints stay, and besides
            them the milestones and the best one.
    """

    def __init__(
        self, engine: DeepSpeedEngine, run_dir: Path, world: World, config: CheckpointConfig
    ) -> None:
        self._engine, self._run_dir, self._world = engine, run_dir, world
        self.place = Place(run_dir)
        self._keep = config.keep
        least = None if config.background_gb is None else config.background_gb * 1e9
        self._writer = engine.checkpoint_engine = BackgroundWriter(least, engine.frozen)
        # DeepSpeed would copy scripts beside the files, which anybody could change.
        engine._copy_recovery_script = lambda save_path: None
        self._commit: Commit | None = None
        self._began = self._stall = 0.0  # seconds

    def start(self, commit: Commit) -> None:
        """Write the state, or copy it and begin to write; before that, finish the save under way.

        Args:
            commit: content of COMMITTED.json; its `files` are filled in when they are written.

        Raises:
            RunError: there is no room, or no permission to write.
        """
        self.finish()
        folder = folder_of(self._run_dir, commit.step)
        self._began = time.monotonic()

        def prepare() -> None:
            # Files that an interrupted save of this step left must not mix with the new ones.
            remove_tree(folder)
            folder.parent.mkdir(exist_ok=True)  # nothing is made where the run folder is gone
            folder.mkdir()

        with _run_errors(folder, self.place):
            on_rank0(prepare)
        self._engine.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)
        self._commit = commit
        self._writer.start()
        self._stall = time.monotonic() - self._began
        if all(gather_to_all(self._writer.finished)):
            self.finish()

    @property
    def written(self) -> bool:
        """Whether a save is under way and this rank has written its part of it."""
        return self._commit is not None and self._writer.finished

    def finish(self) -> None:
        """Wait for the save under way, if any; commit it, and remove checkpoints no longer kept.

        Raises:
            RunError: a rank could not write; nothing was committed.
        """
        commit, self._commit = self._commit, None
        if commit is None:
            return
        folder = folder_of(self._run_dir, commit.step)
        began = time.monotonic()
        files: dict[str, dict[str, Any]] = {}
        error: OSError | None = None
        try:
            files = self._writer.result()
        except OSError as failure:
            error = failure
        with _run_errors(folder, self.place):
            for part, failed in gather_to_all((files, error)):
                if failed is not None:
                    raise failed
                commit.files |= part
            _check_collectives(self._world)
            on_rank0(lambda: self._make_count(folder, commit))
        now = time.monotonic()
        stall = self._stall + now - began
        log.info("saved step %d in %.1f s, %.1f of them training waited", commit.step,
                 now - self._began, stall)  # fmt: skip

    def _make_count(self, folder: Path, commit: Commit) -> None:
        commit.files = dict(sorted(commit.files.items()))
        sync_folder(folder)
        commit.write(folder)
        sync_folder(folder.parent)
        if all(row["event"] != SAVED for row in read_history(self._run_dir)):
            add_history(self._run_dir, SAVED, commit.step)  # `refuse_lost` relies on it
        _prune(self._run_dir, self._keep)


def _check_collectives(world: World) -> None:
    """Check on all ranks that a collective on the device gives what it must.

    After NCCL has given up, for instance because a rank is gone, the state that was saved may hold
    what an aborted collective left behind. Nothing is committed then.

    Raises:
        RunError: it gave another result, or none.
    """
    try:
        ranks = torch.ones(1, device=world.device)
        dist.all_reduce(ranks)
        found = ranks.item()
    except RuntimeError as error:
        raise RunError(f"no checkpoint is committed: a collective has failed ({error})") from error
    if found != world.size:
        raise RunError(f"no checkpoint is committed: {world.size} ranks add up to {found:g}")


@contextlib.contextmanager
def _run_errors(folder: Path, place: Place) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        place.check()
        raise RunError(
            f"{folder} cannot be written: {error.strerror or error}; older checkpoints are as they "
            "were, and the same command goes on once this is mended"
        ) from error


def _prune(run_dir: Path, keep: int) -> None:
    """Remove the checkpoints that need not be kept and the leftovers of interrupted saves."""
    kept, best = 0, best_of(run_dir)
    for folder in _folders(run_dir):
        if folder.is_symlink():  # somebody has moved it to another disk
            continue
        if _claims(folder) and (kept < keep or _stays(folder) or folder == best):
            kept += 1
            continue
        # The commit goes first: a removal that is cut short must not look like a checkpoint.
        (folder / COMMITTED).unlink(missing_ok=True)
        remove_tree(folder)


def _stays(folder: Path) -> bool:
    """Return whether a checkpoint is a milestone, or its commit is damaged: a person must look."""
    try:
        return Commit.read(folder).milestone
    except (OSError, ValueError):
        return True


def best_of(run_dir: Path) -> Path | None:
    """Find the committed checkpoint with the highest validation score; of equals, the first."""
    scores = _scores(run_dir)
    return max(scores, key=lambda folder: (scores[folder], -_step_of(folder)), default=None)


def best_score(run_dir: Path) -> float | None:
    """Return the highest validation score of the committed checkpoints; None without any."""
    return max(_scores(run_dir).values(), default=None)


def _scores(run_dir: Path) -> dict[Path, float]:
    found = {}
    for folder in _folders(run_dir):
        with contextlib.suppress(OSError, ValueError):
            score = Commit.read(folder).score
            if score is not None:
                found[folder] = score
    return found


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def add_score(folder: Path, score: float) -> None:
    """Add the validation score to a committed checkpoint; only one process calls."""
    commit = Commit.read(folder)
    commit.score = score
    commit.write(folder)


def find_checkpoint(path: str | Path) -> Path:
    """Find the checkpoint that a path means: a step folder, or a run folder's newest intact one.

    Raises:
        UserError: there is none, or the checkpoint in the step folder is damaged.
    """
    path = Path(path)
    if (path / COMMITTED).exists():
        wrong = checkpoint_damage(path)
        if wrong is not None:
            raise UserError(f"checkpoint {path} is damaged: {wrong}")
        return path
    if not (path / "config.yaml").exists():
        raise UserError(f"{path} is neither a run folder nor a committed checkpoint of one")
    newest = newest_intact(path)
    if newest is None:
        raise UserError(f"{path} holds no committed checkpoint yet")
    return newest
