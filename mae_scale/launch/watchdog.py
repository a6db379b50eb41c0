"""Ranks that watch each other: when one dies or hangs, all ranks end, and a message names it.

PyTorch does not name it: gloo's error holds an address, NCCL waits for minutes and then aborts the
ranks that waited, and a launcher sees only its own machine. Here each rank writes a record into the
process group's store every second; rank 0 reads all records, and the others read that of rank 0.
Two threads do this; the training itself only assigns a few variables.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from mae_scale.errors import RunError
from mae_scale.files import create_file
from mae_scale.launch.outputs import one_line
from mae_scale.launch.stopping import LAUNCHER_ENDED, StopRequest
from mae_scale.world import World, host

BEAT_S = 1.0  # seconds between two records of a rank
SILENCE_S = 60  # after so long a silence a rank is dead or frozen, or its host cannot be reached
SILENCE_AFTER_BREAK_S = 5  # the same, once a rank has lost a connection
SLOW_S = 1800  # shortest time in which whatever is no usual step may make no progress
DUMP_S = 10  # longest wait for the stacks to be written
VERDICT = "verdict"  # key in the store of the message with which all ranks end


@dataclass
class Peer:
    """A rank as the others see it: its last record, and for how many seconds it has not changed."""

    rank: int
    """Number of the rank."""
    record: dict[str, Any] = field(default_factory=dict)
    """Last record that the rank has written; empty before the first."""
    silent: float = 0.0
    """Seconds since the last sign of life."""
    still: float = 0.0
    """Seconds since the rank last went on to something else."""

    def update(self, record: dict[str, Any]) -> None:
        """Take in the record of this second.

        Seconds are counted and not measured, so that a job that was suspended as a whole does not
        seem to hang.
        """
        same = record.get("beat") == self.record.get("beat")
        self.silent = self.silent + BEAT_S if same else 0.0
        moved = record.get("moves") != self.record.get("moves")
        self.still = 0.0 if moved else self.still + BEAT_S
        self.record = record

    def __str__(self) -> str:
        place = self.record.get("host")
        return f"rank {self.rank} ({place})" if place else f"rank {self.rank}"


def find_lost(peers: list[Peer], limit: float) -> str | None:
    """Describe the ranks that gave no sign of life for `limit` seconds; None if there are none."""
    silent = [peer for peer in peers if peer.silent >= limit]
    if not silent:
        return None
    return f"lost {_names(silent)}: no sign of life for {max(p.silent for p in silent):.0f} s"


def find_stuck(peers: list[Peer], hang_timeout: float) -> str | None:
    """Describe the ranks that have kept all others waiting for too long; None if none have.

    All ranks do the same things in the same order, so the ranks that are furthest behind keep the
    others waiting. Of several that are equally far behind, those outside of a collective operation
    are to blame.
    """
    if not all(peer.still >= limit_of(peer, hang_timeout) for peer in peers):
        return None
    first = min(peer.record["moves"] for peer in peers)
    behind = [peer for peer in peers if peer.record["moves"] == first]
    stuck = [peer for peer in behind if not peer.record["waits"]] or behind
    return f"{_names(stuck)} hangs: {stuck[0].record['doing']} for {stuck[0].still:.0f} s"


def limit_of(peer: Peer, hang_timeout: float) -> float:
    """Return the seconds that a rank may spend on what it does now without going on."""
    return hang_timeout if peer.record.get("quick") else max(hang_timeout, SLOW_S)


def _names(peers: list[Peer]) -> str:
    more = f" and {len(peers) - 3} more" if len(peers) > 3 else ""
    return ", ".join(map(str, peers[:3])) + more


class Watchdog:
    """Tells the other ranks about this one, and ends this process when one of them is gone.

    Each process group has its own watchdog. The group must exist before the watchdog is made.

    Args:
        world: this rank.
        hang_timeout: number of seconds without progress on any rank, after which all ranks end.
            What may take longer than a usual step has `SLOW_S` seconds.
        store: store of the watchdogs of this group.
        stop: request that is set when the launcher ends; None if this process does not train.

    Attributes:
        run_dir: run folder, in which the stacks of all ranks are written before they end; None:
            they are not written.
    """

    def __init__(
        self,
        world: World,
        hang_timeout: float,
        store: dist.Store,
        stop: StopRequest | None = None,
    ) -> None:
        self._world, self._hang_timeout, self._stop_request = world, hang_timeout, stop
        self._record: dict[str, Any] = {
            "beat": 0, "host": host(), "moves": 0, "doing": "starting",
            "quick": False, "waits": False, "broken": None,
        }  # fmt: skip
        self.run_dir: Path | None = None
        self._since = time.monotonic()
        if stop is not None:
            stop.doing = self.now
        self._stop = threading.Event()
        self._leaving = False
        self._threads: list[threading.Thread] = []
        self._peers = [Peer(r) for r in (range(world.size) if world.rank == 0 else [0])]
        self._store = store
        self._records: list[dict[str, Any]] = []
        self._verdict: str | None = None
        self._rounds, self._store_is_gone = 0, False

    def start(self) -> None:
        """Start the threads that write and watch records.

        All ranks have just met, so that their first records come at once. A rank that is lost a
        moment later is then known by its host.
        """
        self._talk()
        with suppress(dist.DistError):  # whoever is gone already is found by the threads
            keys = [str(peer.rank) for peer in self._peers]
            self._store.wait(keys, timedelta(seconds=5 * BEAT_S))
            self._talk()
        for target in (self._keep_talking, self._watch):
            self._threads.append(threading.Thread(target=target, daemon=True))
            self._threads[-1].start()

    def doing(self, what: str, *, quick: bool = False) -> None:
        """Take note of what this rank does from now on.

        All ranks give the same texts in the same order.

        Args:
            what: what it does, such as "saving step 7".
            quick: whether it is part of a usual step, so that `hang_timeout` holds.
        """
        self._record["doing"], self._since = what, time.monotonic()
        self._record["quick"] = quick
        self._record["moves"] += 1  # last, so that the text always fits the count

    def now(self) -> tuple[str, float]:
        """Return what this rank does, and for how many seconds it has done so."""
        return self._record["doing"], time.monotonic() - self._since

    def leave(self) -> None:
        """Allow the other ranks, and with rank 0 the store, to end from now on."""
        self._leaving = True

    def stop(self) -> None:
        """Stop watching."""
        self._stop.set()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(2 * BEAT_S)  # a thread that waits for a lost store is left behind

    def report(self, error: Exception) -> None:
        """Tell the other ranks why this one fails.

        If it fails because another rank is gone, wait until that is named, and end with its name.
        """
        what = str(error) if isinstance(error, RunError) else f"{type(error).__name__}: {error}"
        what = " ".join(what.split())[:500]
        if _is_broken_connection(error):
            self._record["broken"] = what
            self._threads[-1].join(2 * SILENCE_S)  # this thread ends the process
            return
        self.stop()
        if not self._store_is_gone:
            self._tell(f"{Peer(self._world.rank, self._record)} failed: {what}")

    def _tell(self, verdict: str) -> None:
        """Write the verdict unless there is one, and give the others time to read it."""
        try:
            if not self._store.check([VERDICT]):
                self._store.set(VERDICT, verdict)
        except dist.DistError:
            return
        if self._world.size > 1:
            time.sleep((2 if self._world.rank else 3) * BEAT_S)

    def _talk(self) -> None:
        """Write this rank's record, and read the verdict and the records of the peers."""
        self._record["beat"] += 1
        self._record["waits"] = _is_in_a_collective()
        self._store.set(str(self._world.rank), json.dumps(self._record))
        if self._store.check([VERDICT]):
            self._verdict = self._store.get(VERDICT).decode()
        keys = [str(peer.rank) for peer in self._peers]
        if self._store.check(keys):
            values = self._store.multi_get(keys)
        else:  # one has died before its first record, or has yet to write it
            values = [self._store.get(key) if self._store.check([key]) else b"" for key in keys]
        self._records = [json.loads(value) if value else {} for value in values]
        self._rounds += 1

    def _keep_talking(self) -> None:
        try:
            while not self._stop.wait(BEAT_S):
                self._talk()
        except dist.DistError:
            self._store_is_gone = True

    def _watch(self) -> None:
        me, rounds, unanswered = Peer(self._world.rank), 0, 0.0
        while not self._stop.wait(BEAT_S):
            me.update(dict(self._record))
            if rounds != self._rounds:
                rounds, unanswered = self._rounds, 0.0
                for peer, record in zip(self._peers, self._records, strict=True):
                    peer.update(record)
            else:
                unanswered += BEAT_S
            broken = [p for p in [me, *self._peers] if p.record.get("broken")]
            limit = SILENCE_AFTER_BREAK_S if broken else min(SILENCE_S, self._hang_timeout)
            if self._store_is_gone or unanswered >= limit:
                self._go_without_store(me)
                continue
            verdict = self._verdict or find_lost(self._peers, limit)
            if verdict is None and self._world.rank == 0:
                verdict = find_stuck(self._peers, self._hang_timeout)
            if verdict is None and broken and broken[0].still >= 3 * limit:
                verdict = f"{_names(broken[:1])} failed: {broken[0].record['broken']}"
            if verdict is not None:
                self._end(verdict, tell=True)

    def _go_without_store(self, me: Peer) -> None:
        """Decide what to do when the store does not answer.

        The store is part of rank 0 and ends with it. Under torchrun the store is part of the
        launcher; then this process stops as if it had been asked to.
        """
        torchruns = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        if torchruns and self._store_is_gone and self._stop_request is not None:
            self._stop_request.set(LAUNCHER_ENDED)
        if (
            not (torchruns or self._leaving)
            or me.record["broken"]
            or me.still >= limit_of(me, self._hang_timeout)
        ):
            self._end(f"lost {self._peers[0]}: its store does not answer")

    def _dump(self, run_dir: Path) -> None:
        """Write where each thread of this rank is, and what NCCL has recorded, if it has."""
        folder = run_dir / "stacks"
        folder.mkdir(exist_ok=True)
        with create_file(folder / f"rank-{self._world.rank}.txt") as file:
            faulthandler.dump_traceback(file)
        if "nccl" in dist.get_backend_config():
            record = torch._C._distributed_c10d._dump_nccl_trace_json()  # type: ignore[attr-defined]
            with create_file(folder / f"rank-{self._world.rank}-nccl.json") as file:
                file.write(record)

    def _end(self, verdict: str, tell: bool = False) -> NoReturn:
        if self.run_dir is not None:
            dump = threading.Thread(target=self._dump, args=(self.run_dir,), daemon=True)
            dump.start()
            dump.join(DUMP_S)  # the folder may not answer
        if tell:
            self._tell(verdict)
        # The main thread may wait for ever, so the process ends without it; data workers end, too.
        with suppress(OSError):  # the terminal was closed
            print(f"mae-scale: error: {one_line(verdict)}", file=sys.stderr, flush=True)
        os._exit(1)


def _is_broken_connection(error: Exception) -> bool:
    """Return whether another rank caused an error.

    In that case gloo raises a plain RuntimeError, and NCCL a DistError.
    """
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "/gloo/" in str(error)
    )


# Files of the functions in which the host waits for a GPU. The GPU may wait in a collective for a
# rank that is late.
WAITING_FOR_A_STREAM = ("/torch/cuda/streams.py", "/torch/cuda/__init__.py")


def _is_in_a_collective() -> bool:
    """Return whether a thread is in a call of torch.distributed, or waits for the end of one.

    It may wait inside DeepSpeed, or for a stream of the GPU, into which NCCL puts its collectives.
    """
    for innermost in sys._current_frames().values():
        file = innermost.f_code.co_filename
        if "/deepspeed/" in file or file.endswith(WAITING_FOR_A_STREAM):
            return True
        frame: FrameType | None = innermost
        while frame:
            if frame.f_code.co_filename == distributed_c10d.__file__:
                return True
            frame = frame.f_back
    return False
