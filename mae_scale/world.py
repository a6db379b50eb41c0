"""The place of this process in its run, and its share of the machine, read from the environment."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mae_scale.errors import UserError

if TYPE_CHECKING:
    import torch

# Lowest number of Slurm's special steps. Slurm numbers the steps of srun from 0; the steps of batch
# scripts and of salloc's shells have this number, a higher one, or none.
FIRST_SPECIAL_STEP = 0xFFFFFFF0
DEVICE = "MAE_SCALE_DEVICE"  # environment variable; its value is cpu or auto
GPU_FILE = Path("/dev/nvidia0")
DRIVER_FILE = Path("/proc/driver/nvidia/version")
CGROUPS = Path("/sys/fs/cgroup")  # as a container sees its own
# Ports for the rendezvous of ranks, below those that Linux gives to outgoing connections.
PORTS = range(12000, 32000)


@dataclass(frozen=True)
class World:
    """Rank of this process and size of its run, as torchrun, deepspeed or srun set them."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @classmethod
    def from_environment(cls) -> World:
        """Read rank and size as torchrun or deepspeed have set them, or else as srun has.

        Where none of them has started the process, it is alone: rank 0 of 1. A process that is
        started by hand in an allocation, without srun, is alone too.

        Raises:
            UserError: a variable is no number, or a rank is not below the number of ranks.
        """
        env = os.environ
        if "RANK" not in env and is_slurm_task(env):
            size = _number(env, "SLURM_STEP_NUM_TASKS", 1)
            per_node = _per_node(env)
            local_size = per_node[_number(env, "SLURM_NODEID", 0, len(per_node))]
            ranks = ("SLURM_PROCID", "SLURM_LOCALID")
        else:
            size = _number(env, "WORLD_SIZE", 1, default=1)
            name = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in env else "LOCAL_SIZE"
            local_size = _number(env, name, 1, default=size)
            ranks = ("RANK", "LOCAL_RANK")
        return cls(
            rank=_number(env, ranks[0], 0, size, default=0),
            size=size,
            local_rank=_number(env, ranks[1], 0, local_size, default=0),
            local_size=local_size,
        )

    @property
    def device(self) -> torch.device:
        """The GPU of this rank, or the CPU where there is no GPU or `MAE_SCALE_DEVICE` is cpu.

        A rank that sees a single GPU (Slurm's --gpus-per-task) takes that one.

        Raises:
            UserError: something says that there are GPUs, but PyTorch cannot use them.
        """
        import torch

        wanted = os.environ.get(DEVICE, "auto")
        if wanted not in ("auto", "cpu"):
            raise UserError(f"{DEVICE}={wanted} must be cpu or auto")
        if wanted == "cpu":
            return torch.device("cpu")
        if torch.cuda.is_available():
            return torch.device("cuda", self.local_rank if torch.cuda.device_count() > 1 else 0)
        evidence = gpu_evidence(os.environ)
        if evidence is not None:
            raise UserError(
                f"{host()} has no usable GPU although {evidence}: {_why_no_cuda()}; update the "
                "driver, install a PyTorch that it can run, or give the container its GPUs "
                f"(apptainer --nv); {DEVICE}=cpu computes on the CPU instead"
            )
        return torch.device("cpu")


def gpu_evidence(env: Mapping[str, str], device_file: Path = GPU_FILE) -> str | None:
    """Say in words what shows that this process has GPUs; None: nothing does.

    A CUDA_VISIBLE_DEVICES that names no GPU hides those of a machine on purpose, but not those
    that Slurm has given to the job. DeepSpeed's launcher names as many GPUs as processes are asked
    for, whether there are GPUs or not; the variable is no evidence there.

    Args:
        env: environment variables.
        device_file: file that exists where a driver has found a GPU.
    """
    on_node = env.get("SLURM_GPUS_ON_NODE", "0")
    if on_node not in ("", "0"):
        return f"SLURM_GPUS_ON_NODE={on_node}"
    if env.get("SLURM_JOB_GPUS"):
        return f"SLURM_JOB_GPUS={env['SLURM_JOB_GPUS']}"
    visible = env.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and "CROSS_SIZE" not in env:  # DeepSpeed's launcher sets CROSS_SIZE
        # CUDA takes the GPUs up to the first word that is neither a number nor a UUID.
        named = re.match(r"\s*(\d|GPU-|MIG-)", visible)
        return f"CUDA_VISIBLE_DEVICES={visible}" if named else None
    return f"there is {device_file}" if device_file.exists() else None


def _why_no_cuda() -> str:
    """Describe the driver's version, the CUDA that PyTorch is built for, and PyTorch's error."""
    import torch

    try:
        first = DRIVER_FILE.read_text().splitlines()[0]
        found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", first)
        driver = f"the driver is {found[0] if found else first}"
    except OSError:
        driver = "no driver is loaded here"
    built = torch.version.cuda
    wheel = f"PyTorch {torch.__version__} is built for {f'CUDA {built}' if built else 'CPUs only'}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f"{driver}, {wheel} and says: {str(error).splitlines()[0].rstrip('.')}"
    return f"{driver}, {wheel}"


def is_slurm_task(env: Mapping[str, str]) -> bool:
    """Return whether srun has started this process."""
    step = _number(env, "SLURM_STEP_ID", 0, default=FIRST_SPECIAL_STEP)
    return "SLURM_PROCID" in env and step < FIRST_SPECIAL_STEP


def _number(
    env: Mapping[str, str],
    name: str,
    least: int,
    below: int | None = None,
    default: int | None = None,
) -> int:
    """Read a whole number from an environment variable.

    Args:
        env: environment variables.
        name: name of the variable.
        least: smallest value.
        below: number that the value must be below; None: there is none.
        default: value where the variable is not set; None: it must be set.

    Raises:
        UserError: the variable is not set, or holds something else.
    """
    if name not in env and default is not None:
        return default
    text = env.get(name, "").strip()
    value = int(text) if re.fullmatch("[0-9]{1,18}", text) else None
    if value is None or value < least or (below is not None and value >= below):
        most = "" if below is None else f", below {below} (the number of ranks or nodes)"
        is_set = f"{name}={env[name]}" if name in env else f"{name} is not set; it"
        raise UserError(
            f"environment: {is_set} must be a whole number from {least} on{most}; torchrun, "
            "deepspeed and srun set it, and a process that runs alone needs none"
        )
    return value


def _per_node(env: Mapping[str, str]) -> list[int]:
    """Parse the tasks of each node of a step: "2(x3),1" becomes [2, 2, 2, 1]."""
    name = "SLURM_STEP_TASKS_PER_NODE"
    text = env.get(name, "")
    counts = re.findall(r"(\d{1,6})(?:\(x(\d{1,6})\))?(?:,|$)", text)
    per_node = [int(count) for count, times in counts for _ in range(int(times or 1))]
    if not re.fullmatch(r"[\d(x),]+", text) or min(per_node, default=0) < 1:
        raise UserError(
            f"environment: {name}={text} must list the tasks of each node, such as "
            "2(x3),1; srun sets it"
        )
    return per_node


def host() -> str:
    """Return the name of this machine: Slurm's name for it, or its own outside of Slurm."""
    return os.environ.get("SLURMD_NODENAME") or platform.node()


def cpus() -> int:
    """Count the CPUs of this rank.

    Under srun they are the CPUs of its task; otherwise the ranks of a machine share the CPUs that
    they may use. Where srun has started a launcher (`srun ... torchrun`), the ranks of the launcher
    share the CPUs of its task. A container with a quota of CPU time (`docker run --cpus`, a limit
    in Kubernetes) sees all CPUs of its machine, and may use as many as the quota is worth.
    """
    env = os.environ
    allowed = min(len(os.sched_getaffinity(0)), _quota())
    if is_slurm_task(env) and "SLURM_CPUS_PER_TASK" in env:
        of_task = _number(env, "SLURM_CPUS_PER_TASK", 1)
        if "RANK" not in env:
            return of_task
        allowed = min(allowed, of_task)
    return max(1, allowed // World.from_environment().local_size)


def _quota() -> int:
    """Return how many CPUs the quota of this container is worth, rounded up, or `sys.maxsize`."""
    try:
        if (file := CGROUPS / "cpu.max").exists():  # cgroup v2
            quota, period = file.read_text().split()
        else:
            folder = CGROUPS / "cpu"
            quota, period = ((folder / f"cpu.cfs_{x}_us").read_text() for x in ("quota", "period"))
        return max(1, -(-int(quota) // int(period))) if int(quota) > 0 else sys.maxsize
    except (OSError, ValueError, ZeroDivisionError):  # "max", or no cgroups here
        return sys.maxsize


def compute_threads() -> int:
    """Count the threads of this rank: the CPUs that its data workers leave, at least 1."""
    return max(1, cpus() - data_workers())


def data_workers() -> int:
    """Count the data-loading processes for this rank: one less than its CPUs, 1 to 16."""
    return min(16, max(1, cpus() - 1))


def slurm_rendezvous() -> tuple[str, int]:
    """Return the address of the first node of this srun step, and a port for its rendezvous.

    The port follows from the numbers of job and step, so that all ranks choose the same one.

    Raises:
        UserError: scontrol does not answer, for instance in a container.
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
    number = _number(env, "SLURM_JOB_ID", 0) + 1000 * _number(env, "SLURM_STEP_ID", 0)
    return address, PORTS[number % len(PORTS)]


def _ask(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
