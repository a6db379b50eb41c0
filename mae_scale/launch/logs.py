"""Log lines of a run: rank 0 logs what happens, the other ranks only warnings and errors."""

from __future__ import annotations

import logging
import sys

from tqdm import tqdm

from mae_scale.launch.outputs import one_line
from mae_scale.world import World


class _OneLine(logging.Formatter):
    """Formatter that escapes line ends and control characters: a file name can forge no line."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = one_line(record.message)
        return super().formatMessage(record)


class _AboveTheBar(logging.Handler):
    """Handler that writes to stderr above a progress bar, without breaking the bar."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
            sys.stderr.flush()
        except Exception:
            self.handleError(record)  # prints the error, and raises nothing


def set_up_logging(world: World) -> None:
    """Set up the logger "mae_scale" of this process."""
    handler = _AboveTheBar()
    where = "" if world.size == 1 or world.rank == 0 else f" [rank {world.rank}]"
    handler.setFormatter(_OneLine(f"%(asctime)s{where} %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("mae_scale")
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO if world.rank == 0 else logging.WARNING)
