"""One optimiser step on the global batch, and the numbers that result from it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.profiler import record_function

from mae_scale.config.sections import OptimizerConfig, TrainConfig
from mae_scale.errors import RunError, UserError
from mae_scale.launch.stopping import StopRequest
from mae_scale.launch.watchdog import Watchdog
from mae_scale.randomness import Purpose, hash64
from mae_scale.train.ds import DeepSpeedEngine
from mae_scale.train.nonfinite import StepGuard
from mae_scale.train.schedule import rate_of
from mae_scale.world import World

Batch = dict[str, torch.Tensor]

FIRST_STEPS = 2  # steps of a start that may take long: they compile and warm up


@dataclass
class Wishes:
    """The wishes of one rank, or those that all ranks have agreed on."""

    stop: bool = False
    """Whether a rank was asked to stop."""
    save: bool = False
    """Whether a checkpoint is due by the clock of rank 0."""
    written: bool = False
    """Whether all ranks have written their part of the last checkpoint."""


@dataclass
class StepResult:
    """A step that was handed to the device, and its numbers on their way to the host."""

    step: int
    """Number of steps done, this one included."""
    lr: float
    """Learning rate of the step, before layer-wise factors."""
    wait: float
    """Seconds for which the step waited for data."""
    at: float
    """Time at which the step was handed over, on the monotonic clock."""
    losses: torch.Tensor
    """float64 [accumulation], losses of this rank's micro-batches, on the device."""
    samples: list[torch.Tensor]
    """Sample ids of each micro-batch of this rank, int64."""
    values: torch.Tensor
    """float64 [5] on the host.

    The loss, the gradient norm, and the numbers of ranks that wish to stop, wish to save, and have
    written their part of the last checkpoint."""
    ready: torch.cuda.Event | None
    """Event after which `values` can be read; None: they can be read at once."""

    def numbers(self) -> list[float]:
        """Wait for the values, and return them in the order of `values`."""
        if self.ready is not None:
            self.ready.synchronize()
        return self.values.tolist()

    @property
    def loss(self) -> float:
        """Mean loss over the global batch."""
        return self.numbers()[0]

    @property
    def grad_norm(self) -> float:
        """L2 norm of the gradient over all ranks, before clipping."""
        return self.numbers()[1]

    def agreed(self, world_size: int) -> Wishes:
        """Return the wishes that the ranks agreed on in this step."""
        _, _, stop, save, written = self.numbers()
        return Wishes(stop=stop > 0, save=save > 0, written=written == world_size)


class Stepper:
    """Hands optimiser steps to the device.

    A step is a function of (config, step): the batch comes from the sample order, the learning rate
    from the schedule, and the device's generator is seeded from (seed, step, rank).

    Args:
        engine: engine that is trained.
        loss_of: function that returns the loss of a micro-batch, a scalar on this rank's device; it
            takes the engine, the batch, the steps done and the micro-batch's number in the step.
        world: this rank.
        watchdog: watchdog that is told what this rank does.
        stop: request to stop this process.
        seed: seed of the run.
        train: section `train` of the recipe.
        optim: section `optim` of the recipe.
        steps_per_epoch: number of steps in an epoch, for the learning rate.
        accumulation: number of micro-batches in a step.
    """

    def __init__(
        self,
        *,
        engine: DeepSpeedEngine,
        loss_of: Callable[[DeepSpeedEngine, Batch, int, int], torch.Tensor],
        world: World,
        watchdog: Watchdog,
        stop: StopRequest,
        seed: int,
        train: TrainConfig,
        optim: OptimizerConfig,
        steps_per_epoch: int,
        accumulation: int,
    ) -> None:
        self._engine, self._loss_of, self._world = engine, loss_of, world
        self._watchdog, self._stop = watchdog, stop
        self._done = 0  # steps since this start
        self._seed, self._train, self._optim = seed, train, optim
        self._steps_per_epoch, self._accumulation = steps_per_epoch, accumulation
        self._guard = StepGuard(engine, optim.clip_grad)

    def hand_over(self, batches: Iterator[Batch], step: int, wishes: Wishes) -> StepResult:
        """Hand one optimiser step over to the device, after `step` steps done.

        Args:
            batches: micro-batches of this rank, on the device.
            step: number of steps done.
            wishes: wishes of this rank; `stop` is filled in here.

        Raises:
            RunError: a sample is damaged, or a shard cannot be read.
        """
        key = hash64(Purpose.DEVICE_SEED, self._seed, step, self._world.rank)
        torch.manual_seed(int(key) >> 1)
        lr = self._set_learning_rate(step)
        wait, samples = 0.0, []
        losses = torch.zeros(self._accumulation, dtype=torch.float64, device=self._engine.device)
        for micro in range(self._accumulation):
            began = time.monotonic()
            batch = self._next(batches, step)
            wait += time.monotonic() - began
            samples.append(batch["sample"])
            self._watchdog.doing(f"computing step {step + 1}", quick=self._done >= FIRST_STEPS)
            with record_function("forward"):
                loss = self._loss_of(self._engine, batch, step, micro)
            losses[micro] = loss.detach()
            with record_function("backward"):
                self._engine.backward(loss)
            if micro == self._accumulation - 1:
                wishes.stop = self._stop.reason is not None
                shared = self._agree(losses.mean(), wishes)
                self._guard.watch(shared[0])
            with record_function("optimizer step"):
                self._engine.step()
        numbers = torch.cat([shared[:1], self._guard.grad_norm.double().view(1), shared[1:]])
        values, ready = _to_host(numbers)
        self._done += 1
        return StepResult(
            step=step + 1,
            lr=lr,
            wait=wait,
            at=time.monotonic(),
            losses=losses,
            samples=samples,
            values=values,
            ready=ready,
        )

    def _set_learning_rate(self, step: int) -> float:
        lr = rate_of(self._optim, self._train, step, self._steps_per_epoch)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        return lr

    def _next(self, batches: Iterator[Batch], step: int) -> Batch:
        self._watchdog.doing(
            f"waiting for the data of step {step + 1}", quick=self._done >= FIRST_STEPS
        )
        try:
            with record_function("data wait"):
                return next(batches)
        except (UserError, OSError) as error:
            raise RunError(str(error)) from error  # on this rank alone, in the middle of a run

    def _agree(self, loss: torch.Tensor, wishes: Wishes) -> torch.Tensor:
        """Return the mean loss over the ranks, and how many have each wish: float64 [4]."""
        values = [wishes.stop, wishes.save and self._world.rank == 0, wishes.written]
        own = torch.tensor(values, dtype=torch.float64, pin_memory=loss.is_cuda)
        shared = torch.cat([loss.view(1), own.to(loss.device, non_blocking=True)])
        dist.all_reduce(shared)
        shared[0] /= self._world.size
        return shared


def _to_host(values: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """Copy to the host; return the copy and the event after which it can be read."""
    if values.device.type != "cuda":
        return values, None
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    ready = torch.cuda.Event()
    ready.record()
    return host, ready
