"""What a run records: metrics.jsonl, TensorBoard, and a progress bar or plain lines."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from mae_scale.files import write_atomically

log = logging.getLogger("mae_scale")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line that a kill cut short is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(True) if line.endswith("\n")]


class MetricsLog:
    """Rows of `RUN/metrics.jsonl` and TensorBoard, without a gap or a repeat after a resume.

    Only rank 0 keeps one.

    Args:
        run_dir: folder of the run.
        step: optimiser steps done so far; later rows, of steps that will be done again, go.
    """

    def __init__(self, run_dir: Path, step: int) -> None:
        path = run_dir / "metrics.jsonl"
        rows = [row for row in read_metrics(path) if row["step"] <= step]
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
        self._file = path.open("a")
        self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)

    def write(self, row: dict[str, Any]) -> None:
        """Add one row; it is in the file when this returns."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for key, value in row.items():
            if value is not None and key != "step":
                self._tensorboard.add_scalar(f"train/{key}", value, row["step"])

    def sync(self) -> None:
        """Put all rows on disk, so that a checkpoint never is ahead of them."""
        os.fsync(self._file.fileno())
        self._tensorboard.flush()

    def close(self) -> None:
        """Close both."""
        self._file.close()
        self._tensorboard.close()


class Progress:
    """A progress bar on a terminal, plain lines in a log.

    Args:
        total: steps of the run.
        step: steps done so far.
        steps_per_epoch: for showing the epoch.
    """

    def __init__(self, total: int, step: int, steps_per_epoch: int) -> None:
        self._total = total
        self._steps_per_epoch = steps_per_epoch
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=step, unit="step", dynamic_ncols=True)

    def advance(self) -> None:
        """One more step is done."""
        if self._bar is not None:
            self._bar.update(1)

    def show(self, row: dict[str, Any]) -> None:
        """Show a row of the metrics."""
        text = (
            f"loss {row['loss']:.4f}  lr {row['lr']:.2e}  grad norm {row['grad_norm']:.3f}  "
            f"{row['images_per_second']:.0f} img/s  data wait {row['data_wait']:.0%}"
        )
        if self._bar is not None:
            self._bar.set_postfix_str(text)
            return
        rate = row["images_per_second"] / (row["samples"] / row["step"])
        left = int((self._total - row["step"]) / rate)
        eta = f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
        log.info(
            "step %d/%d  epoch %.2f  %s  ETA %s", row["step"], self._total, row["epoch"], text, eta
        )

    def close(self) -> None:
        """Leave the last state on the screen."""
        if self._bar is not None:
            self._bar.close()
