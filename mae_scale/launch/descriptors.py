"""Limits of a process. Of open files: connections to the other ranks take them, and so do shards.

Every rank is connected to every other one, and rank 0 serves the store that all ranks talk to. The
usual soft limit of 1024 is too low for some hundred ranks, the hard limit rarely is.
"""

from __future__ import annotations

import logging
import resource

from mae_scale.errors import UserError

log = logging.getLogger("mae_scale")

# Counted with gloo (tests/integration/test_descriptors.py), and something to spare.
OWN = 100
PER_RANK, PER_RANK_ON_RANK0 = 1, 3
SHARDS = 512  # that a data worker, or a rank without any, keeps open


def raise_limit() -> int:
    """Raise this process's limit of open files as far as it may go, and return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):  # "unlimited" beyond what the kernel allows
            return soft
    return hard


def needed(rank: int, world_size: int) -> int:
    """Descriptors that a rank takes besides shards, with something to spare."""
    return OWN + (PER_RANK if rank else PER_RANK_ON_RANK0) * world_size


def make_room(rank: int, world_size: int) -> None:
    """Raise the limit, and check it against the number of ranks.

    Raises:
        UserError: the ranks could not all be connected.
    """
    limit = raise_limit()
    if limit == resource.RLIM_INFINITY:
        return
    least = needed(rank, world_size)
    advice = "raise the hard limit (ulimit -Hn, or LimitNOFILE of slurmd)"
    if limit < least:
        raise UserError(
            f"rank {rank} of {world_size} may have {limit} open files and needs {least}; {advice}"
        )
    if limit < least + SHARDS:
        log.warning(
            "rank %d of %d may have %d open files; %d, and %d for shards, would be safe: %s",
            *(rank, world_size, limit, least, SHARDS, advice),
        )


def omit_core_dumps() -> None:
    """Let this process write no core dump: those of all ranks would fill a shared file system."""
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))
