"""Limits of a process: open files, which connections and shards take up, and core dumps.

Every rank is connected to every other rank, and rank 0 serves the store that all ranks use. The
usual soft limit of 1024 open files is too low for several hundred ranks; the hard limit rarely is.
"""

from __future__ import annotations

import logging
import resource

from mae_scale.errors import UserError

log = logging.getLogger("mae_scale")

# Numbers of descriptors, counted with gloo (tests/integration/test_descriptors.py) and rounded up:
# how many a rank needs by itself, and how many for each rank of the run.
OWN = 100
PER_RANK, PER_RANK_ON_RANK0 = 1, 3
SHARDS = 512  # most that a data worker, or a rank without workers, keeps open


def raise_limit() -> int:
    """Raise this process's limit on open files as far as permitted, and return the new limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):  # the hard limit is above what the kernel allows
            return soft
    return hard


def needed(rank: int, world_size: int) -> int:
    """Return how many descriptors a rank takes besides shards, rounded up."""
    return OWN + (PER_RANK if rank else PER_RANK_ON_RANK0) * world_size


def room_for_shards() -> int:
    """Return how many shards a data worker, or a rank without workers, may keep open.

    At most half of the open files are shards, so that a low limit leaves room for all else.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return SHARDS if limit == resource.RLIM_INFINITY else min(SHARDS, max(1, limit // 2))


def make_room(rank: int, world_size: int) -> None:
    """Raise the limit on open files, and check that it suffices for the number of ranks.

    Raises:
        UserError: the limit is too low to connect all ranks.
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
    """Forbid core dumps of this process: those of all ranks would fill a shared file system."""
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))
