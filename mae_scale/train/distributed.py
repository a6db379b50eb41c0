"""Ranks: who this process is, agreeing with the others, starting and ending together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from mae_scale.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among the others, as torchrun and deepspeed tell it by the environment."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @classmethod
    def from_environment(cls) -> World:
        """Read RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; alone where they are not set."""
        env = os.environ
        size = int(env.get("WORLD_SIZE", 1))
        return cls(
            rank=int(env.get("RANK", 0)),
            size=size,
            local_rank=int(env.get("LOCAL_RANK", 0)),
            local_size=int(env.get("LOCAL_WORLD_SIZE", env.get("LOCAL_SIZE", size))),
        )

    @property
    def device(self) -> torch.device:
        """The GPU of this rank, or the CPU where there is none."""
        if torch.cuda.is_available():
            return torch.device("cuda", self.local_rank)
        return torch.device("cpu")


def start(world: World) -> None:
    """Join the process group: gloo for CPU tensors, NCCL for those on a GPU."""
    os.environ.update(
        RANK=str(world.rank), WORLD_SIZE=str(world.size), LOCAL_RANK=str(world.local_rank)
    )
    backend = "gloo"
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
        torch.set_float32_matmul_precision("high")  # TF32 where fp32 is used
        backend = "cpu:gloo,cuda:nccl"
    elif "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // world.local_size))
    timeout = timedelta(minutes=10)
    if world.size == 1:
        # A port of the kernel's choice: two runs on one machine must not meet.
        store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port))
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout)


@contextmanager
def process_group(world: World) -> Iterator[None]:
    """All ranks together from `start` to a common end.

    A rank that fails alone leaves at once, so that the launcher or the broken connection takes the
    others down; a `UserError` is raised on all ranks and ends as orderly as success does.
    """
    start(world)
    try:
        yield
    except UserError:
        finish()
        raise
    finish()


def finish() -> None:
    """Leave the process group when all ranks have come this far."""
    dist.barrier()
    dist.destroy_process_group()


def on_rank0(function: Callable[[], T]) -> T:
    """Call `function` on rank 0 and give its result, or raise its exception, on every rank."""
    outcome: list[tuple[T | None, Exception | None]] = [(None, None)]
    if dist.get_rank() == 0:
        try:
            outcome = [(function(), None)]
        except Exception as error:
            outcome = [(None, error)]
    dist.broadcast_object_list(outcome, src=0)
    result, failure = outcome[0]
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]


def gather_to_all(value: T) -> list[T]:
    """The values of all ranks, in rank order, on every rank."""
    values: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]
