"""Ranks on one machine are reached from this machine only."""

from __future__ import annotations

import subprocess
import sys

import pytest
from runs import free_port

LISTENS = """
import psutil, sys
from mae_scale.launch.distributed import process_group
from mae_scale.world import World
with process_group(World.from_environment(), 60):
    found = [c.laddr.ip for c in psutil.Process().net_connections() if c.status == "LISTEN"]
    print(*set(found))
"""


@pytest.mark.parametrize("size", [1, 2])
def test_no_port_is_open_to_other_machines(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if size > 1:
        monkeypatch.setenv("WORLD_SIZE", str(size))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(size))
        monkeypatch.setenv("MASTER_ADDR", "localhost")
        monkeypatch.setenv("MASTER_PORT", str(free_port()))
    ranks = []
    for rank in range(size):
        monkeypatch.setenv("RANK", str(rank))
        command = [sys.executable, "-c", LISTENS]
        ranks.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    for process in ranks:
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        assert set(out.split()) <= {"127.0.0.1", "::1"}
