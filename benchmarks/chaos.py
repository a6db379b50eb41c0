#!/usr/bin/env python3
"""Strike runs with faults at random moments; after each, the same command must lose nothing.

A chain is one run that is killed, stopped, or has its files, outputs, clock, memory or workers
spoilt, again and again, in a seeded order. After each fault: exit codes are those of the
documentation, no process is left, every committed checkpoint is whole, and the next start goes on
from the newest of them. At the end the metrics equal those of an undisturbed run with as many
processes, bit for bit; where the number of processes changed, losses agree to a thousandth.

It needs Linux, a C compiler (for the clock) and the right to mount (for /dev/shm).

Give it a folder on a small file system (a tmpfs of a GB) to have "disk full" fill it really;
elsewhere files are limited in size.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chaos_chain import Chain, Row
from chaos_faults import (
    ALONE,
    DAMAGE,
    DEEPSPEED,
    FAILING,
    LASTING,
    OUTPUTS,
    SRUN,
    STOPPING,
    TORCHRUN,
)

MOMENTS = ("start-up", "any", "save: begun", "save: files", "save: committed", "save: pruning")
# Arguments of each chain beside folder and shards.
CHAINS: dict[str, dict[str, Any]] = {
    "pretrain-1": {"processes": 1},
    "pretrain-2": {"processes": 2},
    "elastic": {"processes": 1, "elastic": True},
    "finetune": {"processes": 2, "task": "finetune"},
    "linprobe": {"processes": 1, "task": "linprobe"},
}


def plan(chain: Chain, count: int) -> Iterator[tuple[str, str, str]]:
    """Yield `count` faults (launch, fault, moment): all kinds in turn, in a shuffled order."""
    kinds: list[tuple[str, str, str]] = []
    for launch in chain.launches():
        for moment in MOMENTS:
            kinds += [(launch, fault, moment) for fault in ("SIGTERM", "SIGUSR1", "SIGTERM twice")]
            kinds += [(launch, "SIGKILL all ranks", moment)]
            # Before the ranks have met, the remaining ones wait for the process that started them.
            if launch != ALONE and moment != "start-up":
                kinds += [(launch, "SIGKILL a rank", moment)]
            if launch in (TORCHRUN, DEEPSPEED):
                kinds += [(launch, fault, moment) for fault in STOPPING if "launcher" in fault]
        kinds += [(launch, fault, "any") for fault in (*DAMAGE, *FAILING)]
        if launch in (ALONE, SRUN):
            kinds += [(launch, fault, "any") for fault in LASTING]
        if launch == TORCHRUN:
            kinds += [(launch, fault, "any") for fault in OUTPUTS if fault != "output closed"]
    chosen: list[tuple[str, str, str]] = []
    while len(chosen) < count:
        chain.random.shuffle(kinds)
        chosen += kinds
    yield from chosen[:count]


def main() -> None:
    """Strike, and print a line for each fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shards", type=Path, help="folder of training shards")
    parser.add_argument("--faults", type=int, default=300, help="of all chains")
    parser.add_argument("--minutes", type=float, help="strike no more after this time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chains", nargs="+", choices=[*CHAINS], default=[*CHAINS])
    parser.add_argument("--faults_only", nargs="+", metavar="FAULT", help="only these kinds")
    parser.add_argument("--folder", type=Path, help="for the runs")
    args = parser.parse_args()
    import deepspeed
    import torch

    print(f"python benchmarks/chaos.py SHARDS --faults {args.faults} --seed {args.seed} --chains "
          f"{' '.join(args.chains)}")  # fmt: skip
    versions = f"torch {torch.__version__}, DeepSpeed {deepspeed.__version__}"
    print(f"{datetime.date.today()}  {platform.machine()}, {os.cpu_count()} cores, {versions}")
    titles = ("chain", "launch", "fault", "moment", "left", "exit codes", "step", "done again")
    print(LINE.format("", *titles), flush=True)
    number, began = 0, time.monotonic()
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        for place, name in enumerate(args.chains):
            chain = Chain(Path(scratch) / name, args.shards, seed=args.seed, **CHAINS[name])
            share = args.minutes and 60 * args.minutes * (place + 1) / len(args.chains)
            for launch, fault, moment in plan(chain, args.faults // len(args.chains)):
                if args.faults_only and fault not in args.faults_only:
                    continue
                if share and time.monotonic() - began > share:
                    break
                chain.leg(launch, fault, moment)
                number += 1
                if len(chain.rows) > 1:  # its repeated steps are known now
                    show(name, number - 1, chain.rows[-2])
            steps = chain.finish()
            if chain.rows:
                show(name, number, chain.rows[-1])
            how = "to a thousandth" if chain.elastic else "bit for bit"
            print(f"{name}: {len(chain.rows)} faults in {steps} steps; metrics equal those of an "
                  f"undisturbed run {how}", flush=True)  # fmt: skip
    print(
        f"{number} faults; after each the same command went on from the newest whole checkpoint; "
        "no process, temporary file or shared memory was left."
    )


LINE = "{:>4} {:11}{:10}{:22}{:16}{:23}{:11}{:>6}{:>11}"


def show(name: str, number: int, row: Row) -> None:
    """Print a line of the table."""
    text = (row.launch, row.fault, row.moment, row.found, row.codes, row.step, row.redone)
    print(LINE.format(number, name, *text), flush=True)


if __name__ == "__main__":
    main()
