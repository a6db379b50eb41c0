"""The training loop: one pass through `steps` is one optimiser step of the global batch."""

from __future__ import annotations

import logging
import math
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.utils import get_total_norm

from mae_scale.config import CheckpointConfig, OptimConfig, TrainConfig
from mae_scale.errors import RunError, UserError
from mae_scale.randomness import Purpose, hash64
from mae_scale.train import checkpoint
from mae_scale.train.distributed import World
from mae_scale.train.ds import DeepSpeedEngine
from mae_scale.train.metrics import MetricsLog, Progress
from mae_scale.train.schedule import learning_rate
from mae_scale.train.stopping import stop_request
from mae_scale.train.watchdog import watchdog

log = logging.getLogger("mae_scale")

Batch = dict[str, torch.Tensor]


@dataclass
class Loop:
    """Everything a run needs to go from one step to the next.

    A step is a function of (config, step): the batch comes from the sample order, the learning
    rate from the schedule, the device's generator is seeded from (seed, step, rank).
    """

    engine: DeepSpeedEngine
    loss_of: Callable[[Batch], torch.Tensor]
    """Loss, a scalar, of a micro-batch on this rank."""
    world: World
    run_dir: Path
    seed: int
    train: TrainConfig
    optim: OptimConfig
    checkpoint: CheckpointConfig
    steps_per_epoch: int
    accumulation: int
    commit: dict[str, Any]
    """What COMMITTED.json says besides step, samples, milestone and files."""

    @property
    def total_steps(self) -> int:
        """Steps after which the run is finished."""
        return total_steps(self.train, self.steps_per_epoch)

    def run(self, batches: Iterator[Batch], step: int) -> tuple[int, bool]:
        """Train from `step` steps done until the end or until a signal asks to stop.

        Returns:
            Steps done, and whether the run is finished.

        Raises:
            RunError: the loss is not finite; the step was not applied.
        """
        first = self.world.rank == 0
        metrics = MetricsLog(self.run_dir, step) if first else None
        progress = Progress(self.total_steps, step, self.steps_per_epoch) if first else None
        saved_step, saved_time = step, time.monotonic()
        meter = Meter(self.train.global_batch_size)
        try:
            stop = False
            while step < self.total_steps and not stop:
                minutes = self.checkpoint.every_minutes
                save_due = minutes is not None and time.monotonic() - saved_time > minutes * 60
                loss, lr, grad_norm, wait, stop, save_due = self._step(batches, step, save_due)
                step += 1
                meter.add(wait)
                if progress:
                    progress.advance()
                if metrics and progress and step % self.train.log_every == 0:
                    row = {
                        "step": step,
                        "epoch": step / self.steps_per_epoch,
                        "samples": step * self.train.global_batch_size,
                        "loss": loss,
                        "lr": lr,
                        "grad_norm": grad_norm,
                        **meter.rates(),
                        "mfu": None,
                        "memory_gb": memory_gb(),
                        "time": time.time(),
                    }
                    metrics.write(row)
                    progress.show(row)
                milestone = self._is_milestone(step)
                every = self.checkpoint.every_steps
                if save_due or milestone or (every is not None and step % every == 0):
                    self._save(step, milestone, metrics)
                    saved_step, saved_time = step, time.monotonic()
            if saved_step != step:
                self._save(step, self._is_milestone(step), metrics)
            return step, step >= self.total_steps
        finally:
            if progress:
                progress.close()
            if metrics:
                metrics.close()

    def _step(
        self, batches: Iterator[Batch], step: int, save_due: bool
    ) -> tuple[float, float, float, float, bool, bool]:
        """One optimiser step.

        Returns:
            Loss, learning rate, gradient norm, seconds waited for data, whether any rank was asked
            to stop, whether to save.
        """
        key = hash64(Purpose.DEVICE_SEED, self.seed, step, self.world.rank)
        torch.manual_seed(int(key) >> 1)
        lr = learning_rate(
            step / self.steps_per_epoch,
            peak=self.optim.base_lr * self.train.global_batch_size / 256,
            floor=self.optim.min_lr,
            warmup=self.optim.warmup_epochs,
            epochs=self.train.epochs,
        )
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        loss_sum = torch.zeros((), device=self.engine.device)
        wait, stop, grad_norm = 0.0, False, None
        for micro in range(self.accumulation):
            began = time.monotonic()
            watchdog.doing(f"waiting for the data of step {step + 1}")
            try:
                batch = next(batches)
            except (UserError, OSError) as error:
                raise RunError(str(error)) from error  # on this rank alone, in the middle of a run
            wait += time.monotonic() - began
            watchdog.doing(f"computing step {step + 1}")
            loss = self.loss_of(batch)
            loss_sum += loss.detach()
            self.engine.backward(loss)
            if micro == self.accumulation - 1:
                mean = loss_sum.item() / self.accumulation
                mean, stop, save_due = self._agree(mean, save_due)
                if not math.isfinite(mean):
                    raise RunError(
                        f"the loss of step {step + 1} is {mean}; the step was not applied and "
                        f"nothing was saved after it"
                    )
                grad_norm = self._unsharded_grad_norm()
            self.engine.step()
        if grad_norm is None:
            grad_norm = float(self.engine.get_global_grad_norm())
        return mean, lr, grad_norm, wait, stop, save_due

    def _agree(self, loss: float, save_due: bool) -> tuple[float, bool, bool]:
        """Mean loss over the ranks, whether any rank was asked to stop, whether rank 0 saves."""
        save_due = save_due and self.world.rank == 0
        values = [loss, stop_request.reason is not None, save_due]
        shared = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(shared)
        return shared[0].item() / self.world.size, bool(shared[1] > 0), bool(shared[2] > 0)

    def _unsharded_grad_norm(self) -> float | None:
        """L2 norm of the gradient under plain AdamW; DeepSpeed's own optimisers know theirs."""
        if hasattr(self.engine.optimizer, "_global_grad_norm"):
            return None
        gradients = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
        return get_total_norm(gradients).item()

    def _is_milestone(self, step: int) -> bool:
        epochs = self.checkpoint.milestone_epochs
        return epochs is not None and step % (epochs * self.steps_per_epoch) == 0

    def _save(self, step: int, milestone: bool, metrics: MetricsLog | None) -> None:
        watchdog.doing(f"saving step {step}")
        if metrics:
            metrics.sync()  # before the commit: a checkpoint must not be ahead of the record
        began = time.monotonic()
        samples = step * self.train.global_batch_size
        commit = checkpoint.Commit(
            step=step, samples=samples, milestone=milestone, files={}, **self.commit
        )
        checkpoint.save(self.engine, self.run_dir, self.world, commit, self.checkpoint.keep)
        log.info("saved step %d in %.1f s", step, time.monotonic() - began)


class Meter:
    """Images per second and the share of time spent waiting for data, between two log rows.

    Args:
        images: per optimiser step, over all ranks.
    """

    def __init__(self, images: int) -> None:
        self._images = images
        self._restart()

    def _restart(self) -> None:
        self._began, self._steps, self._wait = time.monotonic(), 0, 0.0

    def add(self, wait: float) -> None:
        """Count a step that waited so many seconds for data."""
        self._steps += 1
        self._wait += wait

    def rates(self) -> dict[str, float]:
        """`images_per_second` and `data_wait` (0 to 1) since the last call."""
        seconds = time.monotonic() - self._began
        rates = {
            "images_per_second": self._steps * self._images / seconds,
            "data_wait": self._wait / seconds,
        }
        self._restart()
        return rates


def total_steps(train: TrainConfig, steps_per_epoch: int) -> int:
    """Optimiser steps of a run: those of its epochs, or `train.max_steps` if that is less."""
    steps = train.epochs * steps_per_epoch
    return steps if train.max_steps is None else min(steps, train.max_steps)


def memory_gb() -> float:
    """Peak memory of this rank in GB (1e9 bytes): allocated on its GPU, or resident on the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
