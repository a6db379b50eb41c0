"""Who this process is among the others of its run, as the environment tells it."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mae_scale.errors import UserError

if TYPE_CHECKING:
    import torch

# Slurm numbers the steps of srun from 0. Batch scripts and the shells of salloc have numbers from
# here on, or none.
FIRST_SPECIAL_STEP = 0xFFFFFFF0
PORTS = range(12000, 32000)  # below those that Linux gives to outgoing connections


@dataclass(frozen=True)
class World:
    """This process among the others, as torchrun, deepspeed or srun tell it by the environment."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @classmethod
    def from_environment(cls) -> World:
        """Read what torchrun and deepspeed set, else what srun sets; alone where neither is there.

        A process that somebody starts by hand in an allocation, without srun, is alone.
        """
        env = os.environ
        if "RANK" not in env and is_slurm_task(env):
            return cls(
                rank=int(env["SLURM_PROCID"]),
                size=int(env["SLURM_STEP_NUM_TASKS"]),
                local_rank=int(env["SLURM_LOCALID"]),
                local_size=_per_node(env["SLURM_STEP_TASKS_PER_NODE"])[int(env["SLURM_NODEID"])],
            )
        size = int(env.get("WORLD_SIZE", 1))
        return cls(
            rank=int(env.get("RANK", 0)),
            size=size,
            local_rank=int(env.get("LOCAL_RANK", 0)),
            local_size=int(env.get("LOCAL_WORLD_SIZE", env.get("LOCAL_SIZE", size))),
        )

    @property
    def device(self) -> torch.device:
        """The GPU of this rank, or the CPU where there is none.

        Where a rank sees a single GPU (Slurm's --gpus-per-task) that one is its own.
        """
        import torch

        if torch.cuda.is_available():
            return torch.device("cuda", self.local_rank if torch.cuda.device_count() > 1 else 0)
        return torch.device("cpu")


def is_slurm_task(env: Mapping[str, str]) -> bool:
    """Whether srun has started this process."""
    step = int(env.get("SLURM_STEP_ID", FIRST_SPECIAL_STEP))
    return "SLURM_PROCID" in env and step < FIRST_SPECIAL_STEP


def _per_node(counts: str) -> list[int]:
    """Slurm's "2(x3),1" as [2, 2, 2, 1]."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", counts)
    return [int(count) for count, times in found for _ in range(int(times or 1))]


def host() -> str:
    """The machine, by the name that Slurm knows it by."""
    return os.environ.get("SLURMD_NODENAME") or platform.node()


def cpus() -> int:
    """CPUs for this rank: those of its task under srun, else its share of those it may use."""
    env = os.environ
    if is_slurm_task(env) and "SLURM_CPUS_PER_TASK" in env:
        return int(env["SLURM_CPUS_PER_TASK"])
    return max(1, len(os.sched_getaffinity(0)) // World.from_environment().local_size)


def data_workers() -> int:
    """Data-loading processes for this rank: one less than its CPUs, 1 to 16."""
    return min(16, max(1, cpus() - 1))


def slurm_rendezvous() -> tuple[str, int]:
    """Address of the first node of this step of srun, and a port that follows from job and step.

    Raises:
        UserError: Slurm cannot be asked, as in a container.
    """
    env = os.environ
    try:
        nodes = _ask("scontrol", "show", "hostnames", env["SLURM_STEP_NODELIST"]).split()
        found = re.search(r"NodeAddr=(\S+)", _ask("scontrol", "show", "node", nodes[0]))
        address = found[1] if found else nodes[0]
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            f"MASTER_ADDR and MASTER_PORT are not set, and scontrol cannot be asked: {error}"
        ) from error
    number = int(env["SLURM_JOB_ID"]) + 1000 * int(env["SLURM_STEP_ID"])
    return address, PORTS[number % len(PORTS)]


def _ask(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
