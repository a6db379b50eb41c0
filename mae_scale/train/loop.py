"""The training loop: one pass through `steps` is one optimiser step of the global batch."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import record_function

from mae_scale.config.batch import total_steps
from mae_scale.config.sections import CheckpointConfig, OptimizerConfig, TrainConfig
from mae_scale.errors import RunError, UserError
from mae_scale.launch.distributed import World, gather_to_all, on_rank0
from mae_scale.launch.stopping import StopRequest
from mae_scale.launch.watchdog import Watchdog
from mae_scale.planning.gpus import mfu
from mae_scale.randomness import Purpose, hash64
from mae_scale.train.checkpoint import Commit, Saver, add_score, best_score, folder_of
from mae_scale.train.ds import DeepSpeedEngine
from mae_scale.train.metrics import Record
from mae_scale.train.nonfinite import StepGuard, first_nonfinite
from mae_scale.train.profiling import StepProfiler, profiled_steps
from mae_scale.train.schedule import rate_of

log = logging.getLogger("mae_scale")

Batch = dict[str, torch.Tensor]


@dataclass
class Validation:
    """What a run measures now and then besides its loss."""

    every_epochs: int
    """The last epoch counts, too."""
    run: Callable[[DeepSpeedEngine, Watchdog, Callable[[], bool]], dict[str, float] | None]
    """Scores, the same on all ranks; None where the function it is given has said stop."""
    best_by: str
    """The score whose highest value makes the best checkpoint."""

    def is_due(self, step: int, steps_per_epoch: int, epochs: int) -> bool:
        """Whether the model is to be measured after so many steps."""
        last = step == epochs * steps_per_epoch
        return step > 0 and (last or step % (self.every_epochs * steps_per_epoch) == 0)


@dataclass
class Pictures:
    """What a run draws now and then of its model, to be looked at."""

    every_steps: int
    """The last step of the run counts, too."""
    draw: Callable[[DeepSpeedEngine], Callable[[Path, str], None] | None]
    """All ranks call; rank 0 uses what it gives to write a PNG with a title. None: no picture."""


@dataclass
class Loop:
    """Everything a run needs to go from one step to the next.

    A step is a function of (config, step): the batch comes from the sample order, the learning
    rate from the schedule, the device's generator is seeded from (seed, step, rank).

    The host never waits for the device: what a step gives (loss, norm, what the ranks agree on) is
    read when the next step has been handed over. So a wish to stop takes effect one step late.
    """

    engine: DeepSpeedEngine
    loss_of: Callable[[Batch, int, int], torch.Tensor]
    """Loss, a scalar, of a micro-batch on this rank's device; steps done, number in the step."""
    world: World
    watchdog: Watchdog
    stop: StopRequest
    run_dir: Path
    seed: int
    train: TrainConfig
    optim: OptimizerConfig
    checkpoint: CheckpointConfig
    steps_per_epoch: int
    accumulation: int
    commit: dict[str, Any]
    """What COMMITTED.json says besides step, samples, milestone, bad steps and files."""
    flops_per_image: int
    """Of a training step, for model FLOPs utilisation."""
    data_workers: int
    """Data-loading processes per rank."""
    name_of: Callable[[int], str]
    """Shard and member of a sample id, for messages."""
    bad_steps: int = 0
    """Steps of the run so far that were not applied."""
    validation: Validation | None = None
    validates_first: bool = False
    """Whether a signal came before the validation of the last step done."""
    pictures: Pictures | None = None

    def __post_init__(self) -> None:
        self._guard = StepGuard(self.engine)
        self._bad_in_row: list[_Given] = []
        on_gpu = self.engine.device.type == "cuda"
        self._copies = torch.cuda.Stream() if on_gpu else None

    @property
    def total_steps(self) -> int:
        """Steps after which the run is finished."""
        return total_steps(self.train, self.steps_per_epoch)

    def run(self, batches: Iterator[Batch], step: int) -> tuple[int, bool]:
        """Train from `step` steps done until the end or until a signal asks to stop.

        Returns:
            Steps done, and whether the run is finished.

        Raises:
            RunError: `train.max_bad_steps` steps in a row could not be applied, or a checkpoint
                could not be written.
        """
        record = None
        if self.world.rank == 0:
            batch, log_every = self.train.global_batch_size, self.train.log_every
            record = Record(
                self.run_dir, step, self.total_steps, self.steps_per_epoch, batch, log_every,
                self.data_workers, self._mfu, self.validation is not None,
            )  # fmt: skip
        saver = Saver(self.engine, self.run_dir, self.world, self.checkpoint)
        saved_step, saved_time = step, time.monotonic()
        given: _Given | None = None  # the step before, on its way to the host
        agreed = _Agreed()

        def settle() -> None:
            """Read what the last step gave."""
            nonlocal given, agreed
            agreed = _Agreed(stop=agreed.stop)
            if given is not None:
                agreed = given.agreed(self.world.size)
                self._settle(given, record)
            given = None

        def save(score: float | None = None) -> None:
            nonlocal saved_step, saved_time
            settle()
            if saved_step == step:
                return
            self.watchdog.doing(f"saving step {step}")
            if record:
                record.sync()  # before the commit: a checkpoint must not be ahead of the record
            saver.start(self._commit_of(step, score))
            saved_step, saved_time = step, time.monotonic()

        best = on_rank0(lambda: best_score(self.run_dir))

        def validate() -> None:
            """Measure, and save if there was no better step; a signal may come in between."""
            nonlocal best
            settle()
            score = self._validate(step, record)
            if score is None:
                agreed.stop = True
            elif saved_step == step:  # it was stopped in its validation
                saver.finish()
                if record:
                    record.sync()
                    add_score(folder_of(self.run_dir, step), score)
            elif best is None or score > best:
                save(score)
            if score is not None:
                best = score if best is None else max(best, score)

        def draw() -> None:
            settle()
            self.watchdog.doing(f"drawing after step {step}")
            write = self._draw()
            if record:
                if write is not None:
                    record.add_picture(step, write)
                record.leave_out()

        profiler = StepProfiler(
            profiled_steps(self.train), self.run_dir, self.world.rank, self.watchdog
        )
        try:
            if self.validates_first:
                validate()
            while step < self.total_steps and not agreed.stop:
                minutes = self.checkpoint.every_minutes
                save_due = minutes is not None and time.monotonic() - saved_time > minutes * 60
                profiler.before(step + 1)
                with record_function(f"step {step + 1}"):
                    new = self._step(batches, step, _Agreed(False, save_due, saver.written))
                step += 1
                settle()
                given = new
                if profiler.ends_with(step):
                    settle()
                    profiler.write()
                    if record:
                        record.leave_out()
                if self._draws_at(step):
                    draw()
                if self._validates_at(step):
                    validate()
                every = self.checkpoint.every_steps
                if agreed.save or self._is_milestone(step) or (every and step % every == 0):
                    save()
                elif agreed.written:
                    saver.finish()
            save()
            saver.finish()
            return step, step >= self.total_steps
        finally:
            profiler.close()
            if record:
                record.close()

    def _validates_at(self, step: int) -> bool:
        epochs = self.train.epochs
        return self.validation is not None and self.validation.is_due(
            step, self.steps_per_epoch, epochs
        )

    def _validate(self, step: int, record: Record | None) -> float | None:
        """Validate, record, and give what the best checkpoint is chosen by; None: stopped."""
        assert self.validation is not None
        self.engine.eval()
        scores = self.validation.run(
            self.engine, self.watchdog, lambda: self.stop.reason is not None
        )
        self.engine.train()
        if scores is None:
            return None
        if record:
            record.add_validation(step, scores)
        return scores[self.validation.best_by]

    def _draws_at(self, step: int) -> bool:
        return self.pictures is not None and (
            step == self.total_steps or step % self.pictures.every_steps == 0
        )

    def _draw(self) -> Callable[[Path, str], None] | None:
        assert self.pictures is not None
        self.engine.eval()
        write = self.pictures.draw(self.engine)
        self.engine.train()
        return write

    def replay(self, batches: Iterator[Batch], step: int, target: int) -> str:
        """Go from `step` steps done to `target` without writing, watching the last step closely.

        Returns:
            What was found, in words.
        """
        while step < target - 1:
            self._step(batches, step, _Agreed()).numbers()
            step += 1
        with first_nonfinite(self.engine.module) as found:
            given = self._step(batches, step, _Agreed())
            loss, grad_norm, *_ = given.numbers()
        numbers = f"step {target}: loss {loss:.6g}, gradient norm {grad_norm:.6g}"
        places = [
            f"on rank {rank} the first value that is not finite is {place}"
            for rank, place in enumerate(gather_to_all(found()))
            if place is not None
        ]
        return f"{numbers}; {'; '.join(places) or 'every value is finite'}"

    def _step(self, batches: Iterator[Batch], step: int, wishes: _Agreed) -> _Given:
        """Hand one optimiser step over to the device."""
        key = hash64(Purpose.DEVICE_SEED, self.seed, step, self.world.rank)
        torch.manual_seed(int(key) >> 1)
        lr = rate_of(self.optim, self.train, step, self.steps_per_epoch)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        wait, samples = 0.0, []
        losses = torch.zeros(self.accumulation, dtype=torch.float64, device=self.engine.device)
        for micro in range(self.accumulation):
            began = time.monotonic()
            self.watchdog.doing(f"waiting for the data of step {step + 1}")
            try:
                with record_function("data wait"):
                    batch = next(batches)
            except (UserError, OSError) as error:
                raise RunError(str(error)) from error  # on this rank alone, in the middle of a run
            wait += time.monotonic() - began
            samples.append(batch["sample"])
            self.watchdog.doing(f"computing step {step + 1}")
            with record_function("forward"):
                loss = self.loss_of(self._to_device(batch), step, micro)
            losses[micro] = loss.detach()
            with record_function("backward"):
                self.engine.backward(loss)
            if micro == self.accumulation - 1:
                wishes.stop = self.stop.reason is not None
                shared = self._agree(losses.mean(), wishes)
                self._guard.watch(shared[0])
            with record_function("optimizer step"):
                self.engine.step()
        numbers = torch.cat([shared[:1], self._guard.grad_norm.double().view(1), shared[1:]])
        return _Given(step + 1, lr, wait, time.monotonic(), losses, samples, *_to_host(numbers))

    def _to_device(self, batch: Batch) -> Batch:
        """Copy a batch, on a GPU beside what is being computed there."""
        if self._copies is None:
            return batch
        with torch.cuda.stream(self._copies):
            moved = {k: v.to(self.engine.device, non_blocking=True) for k, v in batch.items()}
        now = torch.cuda.current_stream()
        now.wait_stream(self._copies)
        for value in moved.values():
            value.record_stream(now)
        return moved

    def _agree(self, loss: torch.Tensor, wishes: _Agreed) -> torch.Tensor:
        """Mean loss over the ranks, and how many want to stop, save, or have written; float64."""
        values = [wishes.stop, wishes.save and self.world.rank == 0, wishes.written]
        own = torch.tensor(values, dtype=torch.float64, pin_memory=self._copies is not None)
        shared = torch.cat([loss.view(1), own.to(loss.device, non_blocking=True)])
        dist.all_reduce(shared)
        shared[0] /= self.world.size
        return shared

    def _settle(self, given: _Given, record: Record | None) -> None:
        """Count, record, and end the run if too many steps in a row were bad."""
        loss, grad_norm, *_ = given.numbers()
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self._bad_in_row = []
        else:
            self.bad_steps += 1
            self._bad_in_row.append(given)
            log.warning(
                "step %d was not applied: its loss is %g and its gradient norm %g (%d in a row)",
                *(given.step, loss, grad_norm, len(self._bad_in_row)),
            )
        if record:
            record.add(given.step, loss, given.lr, grad_norm, self.bad_steps, given.wait, given.at)
        if len(self._bad_in_row) == self.train.max_bad_steps:
            raise RunError(self._bad_message())

    def _bad_message(self) -> str:
        first = self._bad_in_row[0]
        own = [
            self.name_of(int(sample))
            for loss, samples in zip(first.losses, first.samples, strict=True)
            if not math.isfinite(loss)
            for sample in samples[:8]
        ]
        names = [name for part in gather_to_all(own[:8]) for name in part]
        which = f"; samples with such a loss: {', '.join(names[:8])}" if names else ""
        more = ", ..." if len(names) > 8 else ""
        return (
            f"train.max_bad_steps = {self.train.max_bad_steps} steps in a row could not be applied "
            f"since their loss or gradient was not finite; the first is step {first.step}{which}"
            f"{more}. Nothing was saved after it; --replay {first.step} shows where it begins"
        )

    def _mfu(self, images_per_second: float) -> float | None:
        rate = images_per_second / self.world.size
        return mfu(self.flops_per_image, rate, self.engine.device)

    def _is_milestone(self, step: int) -> bool:
        epochs = self.checkpoint.milestone_epochs
        return epochs is not None and step % (epochs * self.steps_per_epoch) == 0

    def _commit_of(self, step: int, score: float | None) -> Commit:
        return Commit(
            step=step,
            samples=step * self.train.global_batch_size,
            milestone=self._is_milestone(step),
            bad_steps=self.bad_steps,
            files={},
            score=score,
            **self.commit,
        )


@dataclass
class _Agreed:
    """What a rank wishes, or what all have agreed on."""

    stop: bool = False  # any rank was asked to
    save: bool = False  # rank 0's clock says so
    written: bool = False  # all have written their part of the last checkpoint


@dataclass
class _Given:
    """A step that was handed over, and its numbers on their way to the host."""

    step: int  # steps done with it
    lr: float
    wait: float  # seconds, for data
    at: float  # when it was handed over, on the monotonic clock
    losses: torch.Tensor  # float64 [accumulation], of this rank, on the device
    samples: list[torch.Tensor]  # ids of each micro-batch
    values: torch.Tensor  # float64 [5] on the host: loss, gradient norm, stop, save, written
    ready: torch.cuda.Event | None

    def numbers(self) -> list[float]:
        """The values, waited for."""
        if self.ready is not None:
            self.ready.synchronize()
        return self.values.tolist()

    def agreed(self, world_size: int) -> _Agreed:
        """What the ranks agreed on in this step."""
        _, _, stop, save, written = self.numbers()
        return _Agreed(stop > 0, save > 0, written == world_size)


def _to_host(values: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """A copy on the host, and the event after which it is there; None: at once."""
    if values.device.type != "cuda":
        return values, None
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    ready = torch.cuda.Event()
    ready.record()
    return host, ready
