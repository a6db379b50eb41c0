"""Log lines of a run: rank 0 tells what happens, the other ranks only what is wrong."""

from __future__ import annotations

import logging
import sys

from tqdm import tqdm

from mae_scale.launch.distributed import World


class _AboveTheBar(logging.Handler):
    """Writes to stderr without tearing a progress bar apart."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)
        sys.stderr.flush()


def set_up_logging(world: World) -> None:
    """Set up the logger "mae_scale" of this process."""
    handler = _AboveTheBar()
    where = "" if world.size == 1 or world.rank == 0 else f" [rank {world.rank}]"
    handler.setFormatter(logging.Formatter(f"%(asctime)s{where} %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("mae_scale")
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO if world.rank == 0 else logging.WARNING)
