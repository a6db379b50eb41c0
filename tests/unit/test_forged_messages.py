"""Somebody who reaches the port of a run can't end it with a message of their own."""

from __future__ import annotations

import os
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from mae_scale.launch.distributed import process_group
from mae_scale.launch.watchdog import VERDICT
from mae_scale.world import World


@pytest.mark.slow
@pytest.mark.parametrize("forged", ["\x1b[2Jowned", "{}", "0" * 64 + ' {"beat": 1}', "\udcff"])
def test_a_forged_message_counts_for_nothing(forged: str) -> None:
    with process_group(World(), 60) as watchdog:
        port = int(os.environ["MASTER_PORT"])
        stranger = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=5))
        for key in (VERDICT, "0"):
            store = dist.PrefixStore("watchdog/0", stranger)
            store.set(key, forged.encode(errors="surrogateescape"))
        time.sleep(2.5)
        assert watchdog._verdict is None
        assert watchdog._records[0]["doing"] == "starting"
        watchdog.stop()  # a verdict would end this process
        watchdog._tell("rank 0 failed: really")  # replaces the forged record
        assert watchdog._read(VERDICT) == "rank 0 failed: really"
