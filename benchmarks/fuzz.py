#!/usr/bin/env python3
"""Fuzz every place where a file of somebody else is parsed: one line, or success.

Each target of `fuzz_targets` gets good files that hypothesis has spoilt. Reading them may give a
result, a `UserError` or a `RunError`. Anything else is a finding: another exception (a traceback
for a user), more than `MOST_BYTES` of memory, more than `MOST_SECONDS` of CPU time (a hang), or a
message that does not fit on a few lines of a terminal.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import platform
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import hypothesis
from fuzz_targets import TARGETS, Files, Material, Target
from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings

from mae_scale.errors import RunError, UserError
from mae_scale.launch.outputs import one_line

MOST_BYTES = 1 << 30
MOST_SECONDS = 20
MOST_LETTERS = 2000  # characters of a message


class Finding(AssertionError):
    """A result of reading a file that no file may have."""


def check(target: Target, material: Material, files: Files, counts: Counter[str]) -> None:
    """Write some files into a fresh folder and read them.

    Raises:
        Finding: reading them did harm; the message says which.
    """
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        folder = Path(scratch)
        write_files(folder, files)
        before = forget_the_highest()
        try:
            with limit(MOST_SECONDS):
                target.read(material, folder)
            counts["read"] += 1
        except (UserError, RunError) as error:
            counts["refused"] += 1
            if len(one_line(error)) > MOST_LETTERS:
                raise Finding(
                    f"a message of {len(one_line(error))} letters: {error}"[:300]
                ) from None
        except Finding:
            raise
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)
            lines = [f"{Path(f.filename).name}:{f.lineno}" for f in where][-6:]
            raise Finding(
                f"{type(error).__name__}: {error}"[:300] + f" at {' '.join(lines)}"
            ) from error
        finally:
            counts["examples"] += 1
        if (taken := highest() - before) > MOST_BYTES:
            raise Finding(f"it took {taken / 1e9:.1f} GB")


@contextlib.contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raise a `Finding` in a block that takes more CPU time, or waits much longer."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Finding("it hangs")

    old = {name: signal.signal(name, stop) for name in (signal.SIGPROF, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, 20 * seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for name, handler in old.items():
            signal.signal(name, handler)


def forget_the_highest() -> int:
    """Reset the highest memory of this process to what it has now, and give it in bytes."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return highest()


def highest() -> int:
    """Give the highest resident memory of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def fuzz(
    target: Target,
    material: Material,
    examples: int,
    number: int,
    counts: Counter[str],
    keep: Path | None = None,
) -> None:
    """Try some examples of a target; raise the first that is a finding.

    Args:
        number: seed of the examples.
        counts: numbers of examples, under "examples", "read" and "refused", which are added to.
        keep: folder for the files of a finding.
    """

    @seed(number)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate,),
        verbosity=Verbosity.quiet,
        print_blob=False,
        report_multiple_bugs=False,
    )
    @given(target.files(material).map(Hidden))
    def run(hidden: Hidden) -> None:
        if findings:  # hypothesis tries again what has failed
            raise findings[0]
        try:
            check(target, material, hidden.files, counts)
        except Finding as finding:
            if keep is not None:
                write_files(keep, hidden.files)
            findings.append(finding)
            raise

    findings: list[Finding] = []
    try:
        run()
    except BaseException:
        if findings:
            raise findings[0] from None
        raise


class Hidden:
    """Files that hypothesis does not print, since they may have megabytes."""

    def __init__(self, files: Files) -> None:
        self.files = files

    def __repr__(self) -> str:
        return f"{len(self.files)} files"


def write_files(folder: Path, files: Files) -> None:
    """Write files below a folder, by name."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def main() -> int:
    """Go round the targets until the time is over, and print a table of what was tried."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shards", type=Path, help="folder of shards, with real images")
    parser.add_argument("--minutes", type=float, default=60, help="CPU time of all targets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the files of each finding")
    parser.add_argument("--only", nargs="+", help="names of targets")
    args = parser.parse_args()
    soft = 8 << 30  # an endless allocation must not take the machine down
    resource.setrlimit(resource.RLIMIT_DATA, (soft, resource.RLIM_INFINITY))
    targets = [t for t in TARGETS if args.only is None or t.name in args.only]
    counts = {target.name: Counter[str]() for target in targets}
    seconds: Counter[str] = Counter()
    findings: dict[str, str] = {}
    number = args.seed
    print(f"python benchmarks/fuzz.py SHARDS --minutes {args.minutes:g} --seed {args.seed}")
    print(f"{datetime.date.today()}  {platform.machine()}, {os.cpu_count()} cores, "
          f"hypothesis {hypothesis.__version__}", flush=True)  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="fuzz-material-") as scratch:
        os.environ["XDG_STATE_HOME"] = scratch  # indexes that are made here are not the user's
        material = Material(args.shards, Path(scratch))
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with contextlib.suppress(KeyboardInterrupt):  # both signals print what there is
            while sum(seconds.values()) < 60 * args.minutes and len(findings) < len(targets):
                for target in targets:
                    if target.name not in findings:
                        began = time.process_time()
                        keep = args.keep and args.keep / f"{target.name}-{number}"
                        try:
                            quietly(fuzz, target, material, 100, number, counts[target.name], keep)
                        except Exception as error:
                            findings[target.name] = one_line(error)[:600]
                            print(f"FOUND {target.name}: {findings[target.name]}", flush=True)
                        seconds[target.name] += time.process_time() - began
                number += 1
    print(f"{'target':<26}{'examples':>10}{'read':>9}{'refused':>9}{'CPU s':>8}  finding")
    for target in targets:
        c = counts[target.name]
        words = (c["examples"], c["read"], c["refused"], seconds[target.name])
        print("{:<26}{:>10,}{:>9,}{:>9,}{:>8.0f}".format(target.name, *words), end="  ")
        print(findings.get(target.name, "none")[:80])
    total = sum(c["examples"] for c in counts.values())
    print(f"{total:,} examples, {sum(seconds.values()) / 60:.1f} minutes of CPU time, "
          f"{len(findings)} findings")  # fmt: skip
    return int(bool(findings))


def quietly(function: Callable[..., Any], *arguments: Any) -> None:
    """Call a function and drop what it prints."""
    with (
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        function(*arguments)


if __name__ == "__main__":
    sys.exit(main())
