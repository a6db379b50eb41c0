"""The lines in which a benchmark says where and when it ran."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import sys
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import torch


def cpu_name() -> str:
    """Give the name of the CPU."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()


def header(*packages: str) -> str:
    """Give the lines with command, date, machine and versions."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    device = f"{len(gpus)} x {gpus[0]}, " if gpus else ""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", *packages))
    return (
        f"$ python {shlex.join(sys.argv)}\n"
        f"{datetime.date.today()}  {device}{cpu_name()}, {len(os.sched_getaffinity(0))} cores, "
        f"Python {sys.version.split()[0]}, {versions}"
    )
