"""A process group whose end hangs does not keep the process from ending."""

from __future__ import annotations

import threading

import pytest
import torch.distributed as dist

from mae_scale.launch import distributed
from mae_scale.launch.distributed import process_group
from mae_scale.world import World


def test_a_group_that_does_not_end_is_left_behind(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    goes_on = threading.Event()
    monkeypatch.setattr(distributed, "_destroy", goes_on.wait)
    monkeypatch.setattr(distributed, "END_S", 0.1)
    with process_group(World(), 60):
        pass
    goes_on.set()
    dist.destroy_process_group()
    assert "has not ended for 0.1 s" in caplog.text
