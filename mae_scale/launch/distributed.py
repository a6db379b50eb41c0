"""The process group: ranks start together, agree with each other, and end together."""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.rendezvous import rendezvous

from mae_scale.errors import STOPPED, CommonError, RunError, UserError
from mae_scale.launch.descriptors import make_room, omit_core_dumps
from mae_scale.launch.stopping import StopRequest, waiting_for_others
from mae_scale.launch.watchdog import SILENCE_S, SLOW_S, Watchdog
from mae_scale.world import World, compute_threads, cpus, host, is_slurm_task, slurm_rendezvous

T = TypeVar("T")

log = logging.getLogger("mae_scale")

# Environment variables that `start` sets for DeepSpeed and torch where a launcher has not.
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
             "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")  # fmt: skip

# By default torch ends this process when a peer is gone or hangs, without naming a rank.
# - With 2, torch's watchdog only ends the communication. The next collective then raises an error,
#   and the watchdog of this project names the rank.
# - The monitor of torch's watchdog would end the process when a CUDA call hangs for 8 minutes.
NCCL = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "2", "TORCH_NCCL_ENABLE_MONITORING": "0"}

END_S = 60  # longest wait for the process group to end, once all ranks are ready to leave

# Stores that this process serves, by their ports. They outlive their process group: a slower rank
# may still read from one, and the next group of the same processes meets at the same port.
_served: dict[int, dist.Store] = {}


def start(
    world: World, stop: StopRequest | None = None, problem: UserError | None = None
) -> dist.Store:
    """Join the process group: gloo for CPU tensors, NCCL for those on a GPU.

    Args:
        world: this rank.
        stop: request to stop this process, which may have been set while it was starting.
        problem: error that this rank is to tell the others; then the rank needs no GPU.

    A process that is alone needs no port, and ranks on one node listen on loopback only.

    Returns:
        A store for the watchdog, with a connection of its own, since that of the process group may
        be waiting. No other group of these processes uses its keys.

    Raises:
        UserError: the rank may open too few files, or it is not known where rank 0 is.
    """
    one_node = _on_one_node(world)
    make_room(world.rank, world.size)
    omit_core_dumps()
    device = world.device if problem is None else torch.device("cpu")
    # DeepSpeed takes LOCAL_RANK for the number of the GPU.
    local = world.local_rank if device.index is None else device.index
    ranks = {"RANK": world.rank, "WORLD_SIZE": world.size, "LOCAL_RANK": local}
    ranks["LOCAL_WORLD_SIZE"] = world.local_size
    os.environ.update({name: str(value) for name, value in ranks.items()})
    backend = "gloo"
    if device.type == "cuda":
        if device.index < torch.cuda.device_count():  # otherwise the preflight names this rank
            torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 where fp32 is used
        backend = "cpu:gloo,cuda:nccl"
        for name, setting in NCCL.items():
            os.environ.setdefault(name, setting)
    if "OMP_NUM_THREADS" not in os.environ:
        # With a GPU the data workers need the CPU cores; without one the arithmetic needs them.
        torch.set_num_threads(compute_threads() if device.type == "cuda" else cpus())
    timeout = timedelta(minutes=10)
    if one_node:
        for library in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
    if world.size == 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # DeepSpeed asks for them
        alone = dist.HashStore()
        dist.init_process_group(backend, store=alone, rank=0, world_size=1, timeout=timeout)
        return dist.PrefixStore("watchdog", alone)
    if not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        if not is_slurm_task(os.environ):
            raise UserError(
                "WORLD_SIZE is set, but not where rank 0 is: MASTER_ADDR and MASTER_PORT"
            )
        address, port = slurm_rendezvous()
        os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
    if one_node and not _torchrun_serves():
        os.environ["MASTER_ADDR"] = "127.0.0.1"
    with waiting_for_others(stop):
        store = _store(world, one_node, timeout)
        # The store of an earlier group of this process, or torchrun's, still holds its keys.
        number = store.add(f"groups of rank {world.rank}", 1)
        group_store = dist.PrefixStore(f"group {number}", store)
        dist.init_process_group(
            backend, store=group_store, rank=world.rank, world_size=world.size, timeout=timeout
        )
    own = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=SILENCE_S),
    )
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
    return dist.PrefixStore(f"watchdog/{restarts}/{number}", own)


def _on_one_node(world: World) -> bool:
    """Return whether all ranks run on this machine, by what the launcher says."""
    env = os.environ
    if env.get("MASTER_ADDR", "").startswith("127.") or world.size == 1:
        return True
    by_srun = "RANK" not in env and is_slurm_task(env)
    says = by_srun or "LOCAL_WORLD_SIZE" in env or "LOCAL_SIZE" in env
    return says and world.local_size == world.size


def _torchrun_serves() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _store(world: World, one_node: bool, timeout: timedelta) -> dist.Store:
    """Connect to the store of all ranks, which rank 0 serves where torchrun does not.

    PyTorch's own store listens on all interfaces, so on one node rank 0 gives it a socket.
    """
    port = int(os.environ["MASTER_PORT"])
    if world.rank or not one_node or _torchrun_serves():
        store: dist.Store = next(rendezvous("env://", world.rank, world.size, timeout=timeout))[0]
    elif port in _served:
        store = dist.TCPStore("127.0.0.1", port, world.size, timeout=timeout)
    else:
        listener = socket.create_server(("127.0.0.1", port), backlog=1024)
        store = dist.TCPStore(
            "127.0.0.1", port, world.size, is_master=True, timeout=timeout,
            master_listen_fd=listener.detach(),
        )  # fmt: skip
    if world.rank == 0:
        _served.setdefault(port, store)
    return store


@contextmanager
def process_group(
    world: World,
    hang_timeout: float,
    problem: UserError | None = None,
    *,
    stop: StopRequest | None = None,
) -> Iterator[Watchdog]:
    """Keep all ranks together, from `start` to a common end that restores the environment.

    A rank that fails alone tells the others why and leaves, and they end with its message. A
    `UserError` or `CommonError` is raised on all ranks, and the group ends in order as after a
    success. A process may have several groups, one after the other.

    Args:
        world: this rank.
        hang_timeout: seconds without any progress after which the ranks end.
        problem: error that this rank has found before it came here; None: it has found none.
        stop: request to stop this process; None if it does not train.

    Yields:
        The watchdog of the group, which is to be told what this rank does.
    """
    with _environment_kept():
        try:
            watchdog = Watchdog(world, hang_timeout, start(world, stop, problem), stop)
            watchdog.start()
        except OSError as error:  # of the socket
            where = f"port {os.environ['MASTER_PORT']} of this machine"
            raise RunError(f"rank 0 cannot listen on {where}: {error.strerror}") from None
        except RuntimeError as error:  # dist.DistError is one; gloo's errors have no class
            if stop is not None and stop.reason:
                raise SystemExit(STOPPED) from None  # another rank was asked to stop, too, and left
            if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
                raise
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            first = str(error).splitlines()[0]
            raise RunError(f"the {world.size} ranks did not meet at {where}: {first}") from error
        wrong: UserError | CommonError | None = None
        try:
            set_collective_timeout(hang_timeout)
            try:
                _raise_together(problem)
                yield watchdog
            except (UserError, CommonError) as error:
                wrong = error
            finish(watchdog)
        except Exception as error:
            failure = _in_one_line(error)
            watchdog.report(failure)
            if world.size == 1:  # with others, which may be gone, it could wait for them
                _destroy()
            raise failure from error
        if isinstance(wrong, UserError):
            wrong.on_all_ranks = True
        if wrong is not None:
            raise wrong


@contextmanager
def _environment_kept() -> Iterator[None]:
    """Restore the environment variables that `start` sets, at the end of the context."""
    before = {name: os.environ.get(name) for name in (*VARIABLES, *NCCL)}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _raise_together(problem: UserError | None) -> None:
    """Raise on all ranks the error that any of them has found; name the rank unless all have it."""
    found = gather_to_all((host(), None if problem is None else str(problem)))
    texts = {text for _, text in found}
    if texts == {None}:
        return
    if len(texts) == 1:
        raise UserError(found[0][1])
    rank, (place, text) = next((r, f) for r, f in enumerate(found) if f[1] is not None)
    raise UserError(f"rank {rank} ({place}): {text}")


def agreed(world: World, error: UserError) -> UserError:
    """Return the error with which all ranks end when this rank, perhaps alone, has found bad input.

    Ranks that have no process group yet make one for this: a folder that one node lacks must be
    named once, not by each rank or by none.
    """
    if world.size == 1 or error.on_all_ranks:
        return error
    try:
        with process_group(world, 60, error):
            raise AssertionError("a problem ends the process group")
    except UserError as common:
        return common


def _in_one_line(error: Exception) -> Exception:
    """Replace an error by a `RunError` where the machine is to blame and not the program."""
    if isinstance(error, OSError):
        return RunError(str(error))
    writing = ("PytorchStreamWriter", "inline_container.cc", "Parent directory")  # of torch.save
    if isinstance(error, RuntimeError) and any(word in str(error) for word in writing):
        return RunError(f"a checkpoint cannot be written; is the disk full? ({error})")
    if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker"):
        return RunError(f"a data worker ended unexpectedly, out of memory? ({error})")
    return error


def set_collective_timeout(hang_timeout: float) -> None:
    """Give the collectives of all groups a time-out that is longer than the watchdog's.

    So the watchdog ends the run first, and its message names the rank that is to blame.

    Args:
        hang_timeout: time-out of the watchdog in seconds.
    """
    # Public since torch 2.15 only.
    set_timeout = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout
    for group in distributed_c10d._world.pg_map:
        set_timeout(timedelta(seconds=max(hang_timeout, SLOW_S) + 300), group)


def finish(watchdog: Watchdog) -> None:
    """Leave the process group when all ranks have come this far.

    All work is done by then. The end of a group may hang, as that of NCCL does if another rank is
    gone; after `END_S` seconds the rank logs a warning and goes on.
    """
    watchdog.leave()
    dist.barrier()
    watchdog.stop()
    ending = threading.Thread(target=_destroy, name="end of the process group", daemon=True)
    ending.start()
    ending.join(END_S)
    if ending.is_alive():
        log.warning("the process group has not ended for %g s; leaving it behind", END_S)


def _destroy() -> None:
    """Destroy the process group; DeepSpeed, if it is in use, must forget its groups, too."""
    comm = sys.modules.get("deepspeed.comm")
    if comm is not None and comm.is_initialized():
        comm.destroy_process_group()
    else:
        dist.destroy_process_group()


def on_rank0(function: Callable[[], T]) -> T:
    """Call `function` on rank 0, and return its result or raise its exception on every rank.

    All ranks call. Without a process group the only process is rank 0.
    """
    if not dist.is_initialized():
        return function()
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
    """Return the values of all ranks in rank order, on every rank; all ranks call."""
    values: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]
