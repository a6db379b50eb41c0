"""Ranks that watch each other: one that dies or hangs is named, and takes the others down.

PyTorch names nobody: gloo's error holds an address, NCCL waits for minutes and then aborts those
that waited, and a launcher sees its own machine only. Here each rank writes a record into the
process group's store every second, rank 0 looks at all of them, the others look at rank 0's.
Two threads do it; training itself only assigns a few variables.
"""

from __future__ import annotations

import hmac
import json
import os
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from types import FrameType
from typing import Any, NoReturn

import torch.distributed as dist
from torch.distributed import distributed_c10d

from mae_scale.errors import RunError
from mae_scale.launch.outputs import one_line
from mae_scale.launch.stopping import LAUNCHER_ENDED, StopRequest
from mae_scale.world import World, host

BEAT_S = 1.0
SILENCE_S = 60  # without a sign of life: dead, frozen, or the host cannot be reached
SILENCE_AFTER_BREAK_S = 5  # the same, when a rank has lost a connection
VERDICT = "verdict"


@dataclass
class Peer:
    """A rank as others know it: its last record, and the seconds for which that has not changed."""

    rank: int
    record: dict[str, Any] = field(default_factory=dict)
    silent: float = 0.0
    """Seconds since the last sign of life."""
    still: float = 0.0
    """Seconds since the rank last went on to something else."""

    def update(self, record: dict[str, Any]) -> None:
        """Take in the record of this second.

        Seconds are counted and not measured: a job that was suspended as a whole does not hang.
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
    """Name the ranks that gave no sign of life for `limit` seconds; None if there is none."""
    silent = [peer for peer in peers if peer.silent >= limit]
    if not silent:
        return None
    return f"lost {_names(silent)}: no sign of life for {max(p.silent for p in silent):.0f} s"


def find_stuck(peers: list[Peer], limit: float) -> str | None:
    """Name the ranks for which all others have waited `limit` seconds; None if there is none.

    All ranks do the same things in the same order, so the ranks that are behind keep the others
    waiting. Where several are equally far, it is those that are not in a collective operation.
    """
    if not all(peer.still >= limit for peer in peers):
        return None
    first = min(peer.record["moves"] for peer in peers)
    behind = [peer for peer in peers if peer.record["moves"] == first]
    stuck = [peer for peer in behind if not peer.record["waits"]] or behind
    return f"{_names(stuck)} hangs: {stuck[0].record['doing']} for {limit:.0f} s"


def _names(peers: list[Peer]) -> str:
    more = f" and {len(peers) - 3} more" if len(peers) > 3 else ""
    return ", ".join(map(str, peers[:3])) + more


class Watchdog:
    """Tells the other ranks about this one, and ends this process when one of them is gone.

    Each process group has a watchdog of its own; the process group must be there.

    Args:
        world: this rank.
        hang_timeout: seconds without any progress on any rank after which all end.
        store_prefix: of the keys in the store; the same on all ranks, and used only once.
        secret: of the process group. Whoever reaches the port can write into the store; what is not
            signed with the secret counts for nothing.
        stop: is set where the launcher has ended; None if this process does not train.
    """

    def __init__(
        self,
        world: World,
        hang_timeout: float,
        store_prefix: str,
        secret: bytes,
        stop: StopRequest | None = None,
    ) -> None:
        self._secret = secret
        self._world, self._hang_timeout, self._stop_request = world, hang_timeout, stop
        self._record: dict[str, Any] = {
            "beat": 0, "host": host(), "moves": 0, "doing": "starting",
            "waits": False, "broken": None,
        }  # fmt: skip
        self._since = time.monotonic()
        if stop is not None:
            stop.doing = self.now
        self._stop = threading.Event()
        self._leaving = False
        self._threads: list[threading.Thread] = []
        self._peers = [Peer(r) for r in (range(world.size) if world.rank == 0 else [0])]
        # A connection of its own: the process group's may be waiting for an answer.
        self._tcp = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=SILENCE_S),
        )
        self._store = dist.PrefixStore(f"watchdog/{store_prefix}", self._tcp)
        self._records: list[dict[str, Any]] = []
        self._verdict: str | None = None
        self._rounds, self._store_is_gone = 0, False

    def start(self) -> None:
        """Begin to watch."""
        self._talk()
        for target in (self._keep_talking, self._watch):
            self._threads.append(threading.Thread(target=target, daemon=True))
            self._threads[-1].start()

    def doing(self, what: str) -> None:
        """Say what this rank does from now on. All ranks say the same in the same order."""
        self._record["doing"], self._since = what, time.monotonic()
        self._record["moves"] += 1  # after it, so that what is said always fits the count

    def now(self) -> tuple[str, float]:
        """Tell what this rank does, and for how many seconds."""
        return self._record["doing"], time.monotonic() - self._since

    def leave(self) -> None:
        """From now on other ranks may end, and the store may end with rank 0."""
        self._leaving = True

    def stop(self) -> None:
        """Stop watching."""
        self._stop.set()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(2 * BEAT_S)  # one that waits for a store which is gone is left alone

    def report(self, error: Exception) -> None:
        """Tell the others why this rank fails.

        If it is because another one is gone, wait for its name, and end with that.
        """
        what = str(error) if isinstance(error, RunError) else f"{type(error).__name__}: {error}"
        what = " ".join(what.split())[:500]
        if _is_broken_connection(error):
            self._record["broken"] = what
            self._threads[-1].join(2 * SILENCE_S)  # it ends the process
            return
        self.stop()
        if not self._store_is_gone:
            self._tell(f"{Peer(self._world.rank, self._record)} failed: {what}")

    def _tell(self, verdict: str) -> None:
        """Set the verdict, if there is none yet; the store stays until the others have read it."""
        try:
            if not self._store.check([VERDICT]) or self._read(VERDICT) is None:
                self._write(VERDICT, verdict)
        except dist.DistError:
            return
        if self._world.rank == 0 and self._world.size > 1:
            time.sleep(3 * BEAT_S)

    def _talk(self) -> None:
        """Write this rank's record, read those of the peers and the verdict."""
        self._record["beat"] += 1
        self._record["waits"] = _is_in_a_collective()
        self._write(str(self._world.rank), json.dumps(self._record))
        if self._store.check([VERDICT]):
            self._verdict = self._read(VERDICT)
        keys = [str(peer.rank) for peer in self._peers]
        if self._store.check(keys):
            values = self._store.multi_get(keys)
        else:  # one died before its first word, or will come yet
            values = [self._store.get(key) if self._store.check([key]) else b"" for key in keys]
        texts = [self._opened(key, value) for key, value in zip(keys, values, strict=True)]
        # A record that is forged or not there yet is no sign of life.
        self._records = [
            peer.record if text is None else json.loads(text)
            for peer, text in zip(self._peers, texts, strict=True)
        ]
        self._rounds += 1

    def _signature(self, key: str, text: bytes) -> bytes:
        return hmac.digest(self._secret, key.encode() + b"\0" + text, "sha256").hex().encode()

    def _write(self, key: str, text: str) -> None:
        self._store.set(key, f"{self._signature(key, text.encode()).decode()} {text}")

    def _read(self, key: str) -> str | None:
        return self._opened(key, self._store.get(key))

    def _opened(self, key: str, value: bytes) -> str | None:
        """The text of a value that a rank of this group has written, else None."""
        signature, _, text = value.partition(b" ")
        good = hmac.compare_digest(signature, self._signature(key, text))
        return text.decode() if good else None

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
                self._tell(verdict)
                self._end(verdict)

    def _go_without_store(self, me: Peer) -> None:
        """Decide what follows from a store that does not answer.

        It is part of rank 0 and has ended with that. Under torchrun it is part of the launcher;
        then this process stops as if it had been asked to.
        """
        torchruns = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        if torchruns and self._store_is_gone and self._stop_request is not None:
            self._stop_request.set(LAUNCHER_ENDED)
        if (
            not (torchruns or self._leaving)
            or me.record["broken"]
            or me.still >= self._hang_timeout
        ):
            self._end(f"lost {self._peers[0]}: its store does not answer")

    def _end(self, verdict: str) -> NoReturn:
        # The main thread may wait for ever, so it is not asked to end. Data workers end with it.
        with suppress(OSError):  # a terminal that was closed
            print(f"mae-scale: error: {one_line(verdict)}", file=sys.stderr, flush=True)
        os._exit(1)


def _is_broken_connection(error: Exception) -> bool:
    """Whether another rank is the cause: gloo raises a plain RuntimeError, NCCL a DistError."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "/gloo/" in str(error)
    )


# Where the host waits for what a GPU has been given to do: for a collective, where others are late.
WAITING_FOR_A_STREAM = ("/torch/cuda/streams.py", "/torch/cuda/__init__.py")


def _is_in_a_collective() -> bool:
    """Whether a thread is inside a call of torch.distributed, or waits for the end of one.

    It waits in DeepSpeed, or for a stream of the GPU, into which NCCL puts its collectives.
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
