"""The run folder: the first start makes it, and the same command with the same config goes on."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from mae_scale import __version__
from mae_scale.config.identity import as_yaml, differences
from mae_scale.config.yaml_files import load_yaml
from mae_scale.errors import CommonError, RunError, UserError
from mae_scale.files import open_descriptor, read_file, write_atomically
from mae_scale.train.records import HISTORY, read_metrics
from mae_scale.world import host

log = logging.getLogger("mae_scale")

LOCK_WAIT_S = 30
IDLE_RESTARTS = 3  # most restarts by Slurm in a row without a new checkpoint


def open_run(run_dir: Path, config: Any) -> IO[str]:
    """Make the folder, or check that it was made with the same config.

    Only rank 0 calls; it calls `keep_config` or `abandon` afterwards.

    Returns:
        The lock file of the folder. The lock is held until the file is closed or the process ends.

    Raises:
        UserError: another config made the folder (the message shows the difference), it is no run
            folder, one of its files is a link, or another process is training in it.
    """
    path = run_dir / "config.yaml"
    if path.exists():
        check_run(run_dir, config)
    elif run_dir.exists() and (not run_dir.is_dir() or any(run_dir.glob("[!.]*"))):
        raise UserError(f"run_dir {run_dir} exists and is no run folder; use an empty or new one")
    run_dir.mkdir(parents=True, exist_ok=True)
    for item in run_dir.iterdir():
        if item.is_symlink() and not item.is_dir():
            raise UserError(f"{item} is a link that leads to no folder; a run writes no file "
                            "through a link, so remove it")  # fmt: skip
    try:
        lock = os.fdopen(open_descriptor(run_dir / ".lock", os.O_WRONLY | os.O_CREAT), "w")
    except OSError as error:
        raise UserError(f"{run_dir}/.lock cannot be opened: {error.strerror}") from None
    try:
        _wait_for(lock, run_dir)
        os.utime(lock.fileno())  # `status` reads from it when the run was started
    except OSError as error:  # a file system without locks
        log.warning("%s cannot be locked (%s): never start a second job in it", run_dir, error)
    return lock


class Place:
    """The folder of a run, as it was when the run began; another one may take its name later.

    Args:
        run_dir: folder of the run.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir, self._began_as = run_dir, _identity(run_dir)

    def check(self) -> None:
        """Check that the name of the run's folder still leads to the same folder.

        Raises:
            RunError: the folder was renamed or removed, or its disk is gone.
        """
        if _identity(self._run_dir) != self._began_as:
            raise RunError(
                f"{self._run_dir} is no longer the folder that this run began in: it was renamed "
                "or removed; the run ends, and nothing is written under that name"
            )


def _identity(folder: Path) -> tuple[int, int] | None:
    """Return device and inode of a folder; None: it is not there."""
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def keep_config(run_dir: Path, config: Any) -> None:
    """Write config.yaml, which makes `run_dir` the folder of a run with this config."""
    write_atomically(run_dir / "config.yaml", as_yaml(config))


def abandon(run_dir: Path) -> None:
    """Remove a folder that `open_run` has made and that belongs to no run yet."""
    if not (run_dir / "config.yaml").exists():
        with suppress(OSError):  # others may have put something there
            (run_dir / ".lock").unlink()
            run_dir.rmdir()


def check_run(run_dir: Path, config: Any) -> None:
    """Check that a run folder was made with the same config, and write nothing.

    Raises:
        UserError: it was not (the message shows the difference), or it is no run folder.
    """
    path = run_dir / "config.yaml"
    if not path.exists():
        raise UserError(f"{run_dir} is no run folder: it has no config.yaml")
    old = load_yaml(path, of_a_run=True)
    if not isinstance(old, dict):
        raise UserError(f"{path} is not the config of a run")
    changed = differences(old, config)
    if changed:
        raise UserError(
            f"{run_dir} was made with another config ({'; '.join(changed)}); "
            "use its values or another run_dir"
        )


def _wait_for(lock: IO[str], run_dir: Path) -> None:
    """Wait for the lock and take it: a run that was just asked to stop may still be saving."""
    waited = 0
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if waited == LOCK_WAIT_S:
                raise UserError(f"another process is training in {run_dir} right now") from None
            if waited == 0:
                log.info("waiting up to %d s for another process in %s", LOCK_WAIT_S, run_dir)
            time.sleep(1)
            waited += 1


def add_history(run_dir: Path, event: str, step: int, **facts: Any) -> None:
    """Add a line to `RUN/history.jsonl`, which records each start, stop and end of the run.

    Args:
        event: started, resumed, restarted (by Slurm, noted before resumed), saved (the first
            checkpoint), stopped or finished.
        step: number of optimiser steps done at that moment.
        facts: further facts for the line, such as the world size.
    """
    row = {"event": event, "step": step, "time": time.time(), "host": host()}
    path = run_dir / HISTORY
    line = json.dumps({**row, "version": __version__, **facts}) + "\n"
    try:
        before = read_file(path) if os.path.lexists(path) else b""
        write_atomically(path, before + line.encode())
    except OSError as error:  # no reason to end a run
        log.warning("%s cannot be written: %s", path, error)


def read_history(run_dir: str | Path) -> list[dict[str, Any]]:
    """Return the events in `RUN/history.jsonl`, without lines that cannot be read."""
    return [row for row in read_metrics(Path(run_dir) / HISTORY) if "event" in row]


def note_restart(run_dir: Path, step: int) -> None:
    """Note that Slurm has restarted this job, and end a job that gets nowhere; only rank 0 calls.

    Only saved steps are progress. A job that somebody submits again is counted anew.

    Args:
        step: step of the checkpoint to go on from; 0 if there is none.

    Raises:
        CommonError: the last `IDLE_RESTARTS` restarts of this job went on from the same step.
    """
    if int(os.environ.get("SLURM_RESTART_COUNT") or 0) == 0:
        return
    job = os.environ["SLURM_JOB_ID"]
    rows = [row for row in read_history(run_dir) if row["event"] == "restarted"]
    last = [(row.get("job"), row["step"]) for row in rows[-IDLE_RESTARTS:]]
    if last == [(job, step)] * IDLE_RESTARTS:
        raise CommonError(
            f"Slurm has restarted job {job} {IDLE_RESTARTS} times without getting beyond step "
            f"{step}; see above what ended each start, mend it, and submit the job again"
        )
    add_history(run_dir, "restarted", step, job=job)
