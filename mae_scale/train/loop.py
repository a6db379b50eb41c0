"""The training loop: step, settle, validate, draw, save."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.profiler import record_function

from mae_scale.config.sections import RunConfig
from mae_scale.launch.distributed import gather_to_all, on_rank0
from mae_scale.launch.stopping import StopRequest
from mae_scale.launch.watchdog import Watchdog
from mae_scale.train.checkpoint import Commit, Saver, add_score, best_score, folder_of
from mae_scale.train.ds import DeepSpeedEngine
from mae_scale.train.evaluation import Evaluation, Pictures, Schedule, Validation
from mae_scale.train.metrics import Record
from mae_scale.train.nonfinite import BadSteps, first_nonfinite
from mae_scale.train.profiling import StepProfiler
from mae_scale.train.step import Batch, Stepper, StepResult, Wishes


@dataclass
class Loop:
    """Goes from one step of a run to the next.

    The host never waits for the device: the numbers of a step (loss, gradient norm, wishes of the
    ranks) are read after the next step has been handed over. So a wish to stop takes effect one
    step late.
    """

    config: RunConfig
    schedule: Schedule
    engine: DeepSpeedEngine
    stepper: Stepper
    bad_steps: BadSteps
    watchdog: Watchdog
    stop: StopRequest
    saver: Saver
    profiler: StepProfiler
    record: Record | None
    """The run's record on rank 0; None on other ranks."""
    commit: dict[str, Any]
    """Facts that COMMITTED.json holds for every checkpoint of this start."""
    world_size: int
    """Number of processes."""
    validation: Validation | None
    """Validation between steps; None: there is none."""
    pictures: Pictures | None
    """Pictures between steps; None: there are none."""
    step: int
    """Number of optimiser steps done."""

    def __post_init__(self) -> None:
        self._began: float | None = None  # start of the last step
        self._pending: StepResult | None = None  # the last step, on its way to the host
        self._agreed = Wishes()
        self._saved_step, self._saved_at = self.step, time.monotonic()
        self._run_dir = Path(self.config.run_dir)
        self._best = on_rank0(lambda: best_score(self._run_dir))

    def run(self, batches: Iterator[Batch], *, validate_first: bool = False) -> bool:
        """Train to the end or until a signal asks to stop; return whether the end was reached.

        Args:
            batches: batches of the steps to come, in the sample order, on the device.
            validate_first: whether a signal stopped the run before the validation of the last step.

        Raises:
            RunError: `train.max_bad_steps` steps in a row could not be applied, or a checkpoint
                could not be written.
        """
        try:
            if validate_first:
                self._validate()
            while self.step < self.schedule.total_steps and not self._agreed.stop:
                result = self._hand_over(batches)
                self._settle()
                self.step, self._pending = result.step, result
                self._write_trace()
                if self.pictures is not None and self.pictures.is_due(self.step, self.schedule):
                    self._evaluate(self.pictures)
                if self.validation is not None and self.validation.is_due(self.step, self.schedule):
                    self._validate()
                if self._must_save():
                    self._save()
                elif self._agreed.written:
                    self.saver.finish()
            self._save()
            self._check_place()
            self.saver.finish()
            self._check_place()
            return self.step >= self.schedule.total_steps
        finally:
            self.profiler.close()
            if self.record:
                self.record.close()

    def _hand_over(self, batches: Iterator[Batch]) -> StepResult:
        minutes = self.config.checkpoint.every_minutes
        save = minutes is not None and time.monotonic() - self._saved_at > minutes * 60
        self.profiler.before(self.step + 1)
        with record_function(f"step {self.step + 1}"):
            wishes = Wishes(save=save, written=self.saver.written)
            now = time.monotonic()
            if self._began is not None:
                self.stop.step_seconds = now - self._began
            self._began = now
            return self.stepper.hand_over(batches, self.step, wishes)

    def _check_place(self) -> None:
        """Raise a `RunError` on rank 0 if the run's folder was renamed or removed."""
        if self.record:
            self.saver.place.check()

    def _settle(self) -> None:
        """Read the numbers of the last step, and record them."""
        result, self._pending = self._pending, None
        if result is None:
            self._agreed = Wishes(stop=self._agreed.stop)
            return
        self._agreed = result.agreed(self.world_size)
        self._check_place()
        self.bad_steps.count(result)
        if self.record:
            self.record.add(
                step=result.step,
                loss=result.loss,
                lr=result.lr,
                grad_norm=result.grad_norm,
                bad_steps=self.bad_steps.total,
                wait=result.wait,
                at=result.at,
            )
        self.bad_steps.check()

    def _write_trace(self) -> None:
        if self.profiler.ends_with(self.step):
            self._settle()
            self.profiler.write()
            if self.record:
                self.record.leave_out()

    def _evaluate(self, evaluation: Evaluation) -> Any | None:
        """Evaluate the model, record the outcome, and leave the time out of the rates."""
        self._settle()
        self.engine.eval()
        outcome = evaluation.evaluate(
            self.engine, self.watchdog, lambda: self.stop.reason is not None
        )
        self.engine.train()
        if self.record:
            if outcome is not None:
                evaluation.write(self.record, self.step, outcome)
            self.record.leave_out()
        return outcome

    def _validate(self) -> None:
        """Validate, and save if the score is the best so far; a signal may come in between."""
        assert self.validation is not None
        scores = self._evaluate(self.validation)
        if scores is None:
            self._agreed.stop = True
            return
        if self.validation.best_by is None:
            return
        score = scores[self.validation.best_by]
        if self._saved_step == self.step:  # the run was stopped during this validation
            self.saver.finish()
            if self.record:
                self.record.sync()
                add_score(folder_of(self._run_dir, self.step), score)
        elif self._best is None or score > self._best:
            self._save(score)
        self._best = score if self._best is None else max(self._best, score)

    def _is_milestone(self) -> bool:
        epochs = self.config.checkpoint.milestone_epochs
        return epochs is not None and self.step % (epochs * self.schedule.steps_per_epoch) == 0

    def _must_save(self) -> bool:
        every = self.config.checkpoint.every_steps
        due = every is not None and every > 0 and self.step % every == 0
        return self._agreed.save or due or self._is_milestone()

    def _save(self, score: float | None = None) -> None:
        """Save this step, unless it is saved already."""
        self._settle()
        if self._saved_step == self.step:
            return
        self._check_place()
        self.watchdog.doing(f"saving step {self.step}")
        if self.record:
            self.record.sync()  # before the commit: a checkpoint must not be ahead of the record
        self.saver.start(
            Commit(
                step=self.step,
                samples=self.step * self.config.train.global_batch_size,
                milestone=self._is_milestone(),
                bad_steps=self.bad_steps.total,
                files={},
                score=score,
                **self.commit,
            )
        )
        self._saved_step, self._saved_at = self.step, time.monotonic()


def replay(
    stepper: Stepper, engine: DeepSpeedEngine, batches: Iterator[Batch], step: int, target: int
) -> str:
    """Train from step `step` to step `target` without writing, and check every value of the latter.

    Args:
        stepper: stepper of the engine.
        engine: engine with the state after `step` steps.
        batches: batches of the steps to come, in the sample order, on the device.
        step: number of steps done.
        target: step to look at, counted from 1.

    Returns:
        A description of the first value that was not finite on each rank, if there was any.
    """
    while step < target - 1:
        stepper.hand_over(batches, step, Wishes()).numbers()
        step += 1
    with first_nonfinite(engine.module) as found:
        result = stepper.hand_over(batches, step, Wishes())
        numbers = f"step {target}: loss {result.loss:.6g}, gradient norm {result.grad_norm:.6g}"
    places = [
        f"on rank {rank} the first value that is not finite is {place}"
        for rank, place in enumerate(gather_to_all(found()))
        if place is not None
    ]
    return f"{numbers}; {'; '.join(places) or 'every value is finite'}"
