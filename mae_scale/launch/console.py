"""Lines, sizes and progress as shown on a terminal or in a log."""

from __future__ import annotations

import sys
import threading
import time

from tqdm import tqdm

from mae_scale.launch.outputs import one_line

# tqdm's own lock is shared with forked processes, and stays locked when one is killed holding it.
tqdm.set_lock(threading.RLock())


class Progress:
    """Progress of a data tool: a bar on a terminal, a line every 30 seconds elsewhere.

    Both show the rate and the time left.

    Args:
        total: number of units in the whole work.
        unit: name of what is counted; "bytes" are shown in powers of 1000.
    """

    def __init__(self, total: int, unit: str = "images") -> None:
        self.bar = tqdm(
            total=total,
            unit=f" {unit}",
            unit_scale=unit == "bytes",
            smoothing=0.05,
            disable=None,
            dynamic_ncols=True,
        )
        self.total, self.unit = total, unit
        self.start = self.last = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def show(self, done: int) -> None:
        """Show that `done` units are done."""
        if not self.bar.disable:
            self.bar.update(done - self.bar.n)
            return
        now = time.monotonic()
        if now - self.last >= 30 and done:
            self.last = now
            rate = done / (now - self.start)
            say(
                f"{done:,} of {self.total:,} {self.unit}, {rate:,.0f} {self.unit}/s, "
                f"{tqdm.format_interval((self.total - done) / rate)} left"
            )


def size_text(size: float) -> str:
    """Return a number of bytes as people write it, in powers of 1000."""
    unit = "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"


def say(line: str) -> None:
    """Print a line on stdout, above a progress bar if there is one."""
    tqdm.write(one_line(line), file=sys.stdout)
    sys.stdout.flush()


def warn(line: str) -> None:
    """Print a line on stderr, above a progress bar if there is one."""
    tqdm.write(one_line(line), file=sys.stderr)
