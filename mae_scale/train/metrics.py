"""The records of a run: metrics.jsonl, TensorBoard, and a progress bar or plain lines."""

from __future__ import annotations

import logging
import math
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mae_scale.train.records import METRICS, VALIDATION
from mae_scale.train.sinks import Rows, TensorBoard

log = logging.getLogger("mae_scale")

RECONSTRUCTIONS = "reconstructions"  # name of the folder of pictures in the run folder
WIDTH = 80  # most columns of the progress bar
BAR = "{desc} |{bar}| step {n_fmt}/{total_fmt} {postfix} ETA {remaining}"
FIRST, GROWN = 5, 3.0  # first steps that a loss is compared with, and the factor that is reported
SLOW_DATA, SLOW_DATA_S = 0.1, 300.0  # share of the time, and for how many seconds, that is reported


class MetricsLog:
    """Rows of `RUN/metrics.jsonl` and TensorBoard, without a gap or a repeat after a resume.

    Only rank 0 keeps one.

    Args:
        run_dir: folder of the run.
        step: number of optimiser steps done so far. Rows of later steps are removed, since those
            steps will be done again.
        file: name of the file in the folder.
        group: name that groups the curves in TensorBoard.
        tensorboard: TensorBoard of the run; None: this is the first log of the run.
    """

    def __init__(
        self,
        run_dir: Path,
        step: int,
        file: str = METRICS,
        group: str = "train",
        tensorboard: TensorBoard | None = None,
    ) -> None:
        self._rows, self._group = Rows(run_dir / file, step), group
        self.tensorboard = tensorboard or TensorBoard(run_dir / "tensorboard", step)

    def write(self, row: dict[str, Any]) -> None:
        """Add one row; it is in the file when this returns, unless the file cannot be written."""
        self._rows.write(row)
        self.tensorboard.add(self._group, row)

    def show(self, name: str, path: Path, step: int) -> None:
        """Show a PNG in TensorBoard."""
        self.tensorboard.show(name, path, step)

    def sync(self) -> None:
        """Put all rows on disk."""
        self._rows.sync()
        self.tensorboard.flush()

    def close(self) -> None:
        """Close the file and TensorBoard."""
        self._rows.close()
        self.tensorboard.close()


class Progress:
    """A progress bar on a terminal, plain lines in a log.

    Args:
        total: number of steps of the run.
        step: number of steps done so far.
        steps_per_epoch: number of steps in an epoch, for showing the epoch.
    """

    def __init__(self, total: int, step: int, steps_per_epoch: int) -> None:
        self._total = total
        self._steps_per_epoch = steps_per_epoch
        self._bar = None
        if sys.stderr.isatty():
            columns = min(WIDTH, shutil.get_terminal_size().columns - 1)
            self._bar = tqdm(total=total, initial=step, bar_format=BAR, ncols=columns)

    def advance(self) -> None:
        """Count one more step as done."""
        if self._bar is not None:
            self._bar.update(1)

    def show(self, row: dict[str, Any]) -> None:
        """Show a row of the metrics."""
        loss, grad_norm = (math.nan if row[k] is None else row[k] for k in ("loss", "grad_norm"))
        if self._bar is not None:
            self._bar.set_description_str(f"epoch {row['epoch']:.2f}", refresh=False)
            rate = f"{row['images_per_second']:.0f} img/s"
            self._bar.set_postfix_str(f"loss {loss:.4f} {rate}")
            return
        text = (
            f"loss {loss:.4f}  lr {row['lr']:.2e}  grad norm {grad_norm:.3f}  "
            f"{row['images_per_second']:.0f} img/s  data wait {row['data_wait']:.0%}"
        )
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


class Growth:
    """Warns when the loss has grown to several times what it was at the start.

    It compares a moving average with the mean of the first steps of this start of the run.
    """

    def __init__(self) -> None:
        self._first: list[float] = []
        self._average = 0.0
        self._limit = GROWN

    def add(self, step: int, loss: float, lr: float) -> None:
        """Take in the loss of a step; `nonfinite.BadSteps` reports one that is not finite."""
        if not math.isfinite(loss):
            return
        if len(self._first) < FIRST:
            self._first.append(loss)
            self._average = sum(self._first) / len(self._first)
            return
        self._average += (loss - self._average) / FIRST
        first = abs(sum(self._first) / FIRST)
        if first == 0 or self._average < self._limit * first:
            return
        log.warning(
            "the loss grows: %.4g around step %d, %.3g times the %.4g that it was when this start "
            "began; the learning rate %.2e may be too high (optim.base_lr)",
            *(self._average, step, self._average / first, first, lr),
        )
        self._limit = 10 * self._average / first


class Meter:
    """Images per second and the share of time spent waiting for data, between two log rows.

    When that share stays high, the meter warns once and says what to change.

    Args:
        images: number of images of an optimiser step, over all ranks.
        workers: number of data-loading processes per rank.
    """

    def __init__(self, images: int, workers: int) -> None:
        self._images, self._workers = images, workers
        self._slow: float | None = 0.0  # seconds for which data has been slow without a break
        self._began = self._at = time.monotonic()
        self._steps, self._wait = 0, 0.0

    def add(self, wait: float, at: float) -> None:
        """Count a step.

        Args:
            wait: seconds for which the step waited for data.
            at: time at which it was handed to the device, on the monotonic clock.
        """
        self._steps += 1
        self._wait += wait
        self._at = at

    def restart(self) -> None:
        """Leave out the time since the last step."""
        self._began += time.monotonic() - self._at
        self._at = time.monotonic()

    def rates(self) -> dict[str, float]:
        """Return `images_per_second` and `data_wait` (0 to 1) since the last call."""
        seconds = self._at - self._began
        rates = {
            "images_per_second": self._steps * self._images / seconds,
            "data_wait": self._wait / seconds,
        }
        self._advise(rates["data_wait"], seconds)
        self._began, self._steps, self._wait = self._at, 0, 0.0
        return rates

    def _advise(self, data_wait: float, seconds: float) -> None:
        if self._slow is None:  # the warning was given
            return
        self._slow = self._slow + seconds if data_wait > SLOW_DATA else 0.0
        if self._slow > SLOW_DATA_S:
            self._slow = None
            cores = len(os.sched_getaffinity(0))
            log.warning(
                "training has waited for data more than %.0f %% of the time for %d minutes: raise "
                "data.workers (now %d per rank, this process may use %d cores), put the shards on "
                "a faster disk (data.cache_dir stages remote ones), or make smaller ones "
                "(mae-scale shard --resize-short)",
                *(100 * SLOW_DATA, SLOW_DATA_S / 60, self._workers, cores),
            )


class Record:
    """The rows and lines of a run that rank 0 writes down and shows.

    Args:
        run_dir: folder of the run.
        step: number of steps done so far.
        total_steps: number of steps of the run.
        steps_per_epoch: number of steps in an epoch.
        batch: number of images of a step, over all ranks.
        log_every: number of steps between two rows.
        workers: number of data-loading processes per rank, for advice.
        mfu_of: function from images per second, over all ranks, to the model FLOPs utilisation;
            it returns None where the GPU's peak is not known.
        validates: whether to keep validation.jsonl, too.
    """

    def __init__(
        self,
        *,
        run_dir: Path,
        step: int,
        total_steps: int,
        steps_per_epoch: int,
        batch: int,
        log_every: int,
        workers: int,
        mfu_of: Callable[[float], float | None],
        validates: bool = False,
    ) -> None:
        self._run_dir, self._mfu_of, self._total_steps = run_dir, mfu_of, total_steps
        self._steps_per_epoch, self._batch, self._log_every = steps_per_epoch, batch, log_every
        self._metrics = MetricsLog(run_dir, step)
        self._validations = None
        if validates:
            board = self._metrics.tensorboard
            self._validations = MetricsLog(run_dir, step, VALIDATION, "validation", board)
        self._progress = Progress(total_steps, step, steps_per_epoch)
        self._meter = Meter(batch, workers)
        self._growth = Growth()

    def add(
        self,
        *,
        step: int,
        loss: float,
        lr: float,
        grad_norm: float,
        bad_steps: int,
        wait: float,
        at: float,
    ) -> None:
        """Count a step; write a row every `log_every` steps and after the last step of the run.

        Args:
            step: number of the step, counted from 1.
            loss: mean loss over the global batch.
            lr: learning rate, before layer-wise factors.
            grad_norm: L2 norm of the gradient over all ranks.
            bad_steps: number of steps of the run so far that were not applied.
            wait: seconds for which the step waited for data.
            at: time at which it was handed to the device, on the monotonic clock.
        """
        self._meter.add(wait, at)
        self._growth.add(step, loss, lr)
        self._progress.advance()
        if step % self._log_every and step != self._total_steps:
            return
        rates = self._meter.rates()
        row = {
            "step": step,
            "epoch": step / self._steps_per_epoch,
            "samples": step * self._batch,
            "loss": loss if math.isfinite(loss) else None,
            "lr": lr,
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
            "bad_steps": bad_steps,
            **rates,
            "mfu": self._mfu_of(rates["images_per_second"]),
            "memory_gb": memory_gb(),
            "time": time.time(),
        }
        self._metrics.write(row)
        self._progress.show(row)

    def add_validation(self, step: int, scores: dict[str, float]) -> None:
        """Add the scores of the model after a step to validation.jsonl, and log them."""
        assert self._validations is not None
        epoch = step / self._steps_per_epoch
        self._validations.write({"step": step, "epoch": epoch, **scores, "time": time.time()})
        text = "  ".join(f"{key} {value:.4g}" for key, value in scores.items())
        log.info("validation after step %d: %s", step, text)

    def add_picture(self, step: int, write: Callable[[Path, str], None]) -> None:
        """Keep a picture of what the model does after a step.

        Args:
            step: number of steps done.
            write: function of a path and a title that writes the PNG.
        """
        path = self._run_dir / RECONSTRUCTIONS / f"step-{step:08d}.png"
        try:
            path.parent.mkdir(exist_ok=True)  # fails where the run folder is gone
            write(path, f"step {step:,}, epoch {step / self._steps_per_epoch:.4g}")
            self._metrics.show(RECONSTRUCTIONS, path, step)
        except OSError as error:  # no reason to end a run
            log.warning("%s cannot be written: %s", path, error)

    def leave_out(self) -> None:
        """Leave the time since the last step out of the rates."""
        self._meter.restart()

    def sync(self) -> None:
        """Put all rows on disk, so that no checkpoint is ever ahead of them."""
        self._metrics.sync()
        if self._validations is not None:
            self._validations.sync()

    def close(self) -> None:
        """Close all files, and leave the last state of the progress bar on the screen."""
        self._progress.close()
        self._metrics.close()
        if self._validations is not None:
            self._validations.close()


def memory_gb() -> float:
    """Return this rank's peak memory in GB (1e9 bytes): on its GPU, or resident without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
