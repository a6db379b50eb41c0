"""Validations and pictures, which a run makes from time to time besides training.

The loop treats both alike: it asks whether one is due, evaluates the model, records the outcome,
and leaves the time that this took out of the rates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mae_scale.launch.watchdog import Watchdog
from mae_scale.train.ds import DeepSpeedEngine
from mae_scale.train.metrics import Record


@dataclass(frozen=True)
class Schedule:
    """Length of a run in steps."""

    steps_per_epoch: int
    """Optimiser steps in an epoch."""
    epochs: int
    """Epochs of the learning-rate schedule."""
    total_steps: int
    """Number of steps of the whole run; `train.max_steps` may end it before its last epoch."""


class Evaluation(Protocol):
    """Something that a run does with its model from time to time."""

    def is_due(self, step: int, schedule: Schedule) -> bool:
        """Say whether the evaluation is due when `step` steps are done."""
        ...

    def evaluate(
        self, engine: DeepSpeedEngine, watchdog: Watchdog, stop: Callable[[], bool]
    ) -> Any | None:
        """Evaluate the model; all ranks call.

        Args:
            engine: engine of the model, in evaluation mode.
            watchdog: told what this rank does.
            stop: returns whether this rank was asked to stop.

        Returns:
            The outcome for `write`; None if there is nothing to write or the run is to stop.
        """
        ...

    def write(self, record: Record, step: int, outcome: Any) -> None:
        """Record, on rank 0, the outcome that `evaluate` returned."""
        ...


@dataclass
class Validation:
    """Measures the model on a data set."""

    every_epochs: int | None
    """Epochs between two validations; one also follows the last epoch. None: see `every_steps`."""
    run: Callable[[DeepSpeedEngine, Watchdog, Callable[[], bool]], dict[str, float] | None]
    """Function of the engine, the watchdog, and a function that says whether this rank is to stop.

    It returns scores, the same on all ranks; None if it was stopped."""
    best_by: str | None
    """Name of the score whose highest value makes the best checkpoint; None: none is the best."""
    every_steps: int | None = None
    """Optimiser steps between two validations; one also follows the last step of the run."""

    def is_due(self, step: int, schedule: Schedule) -> bool:
        """Say whether the model is to be measured when `step` steps are done."""
        last, every = schedule.total_steps, self.every_steps
        if self.every_epochs is not None:
            last = schedule.epochs * schedule.steps_per_epoch
            every = self.every_epochs * schedule.steps_per_epoch
        assert every is not None
        return step > 0 and (step == last or step % every == 0)

    def evaluate(
        self, engine: DeepSpeedEngine, watchdog: Watchdog, stop: Callable[[], bool]
    ) -> dict[str, float] | None:
        """Measure the model; return its scores, or None if a signal came in between."""
        return self.run(engine, watchdog, stop)

    def write(self, record: Record, step: int, outcome: dict[str, float]) -> None:
        """Add a row to validation.jsonl."""
        record.add_validation(step, outcome)


@dataclass
class Pictures:
    """Draws what the model makes of some images."""

    every_steps: int
    """Optimiser steps between two pictures; one also follows the last step of the run."""
    draw: Callable[[DeepSpeedEngine], Callable[[Path, str], None] | None]
    """Function of the engine; all ranks call it.

    It returns the function with which rank 0 writes a PNG with a title; None: no picture."""

    def is_due(self, step: int, schedule: Schedule) -> bool:
        """Say whether pictures are to be drawn when `step` steps are done."""
        return step == schedule.total_steps or step % self.every_steps == 0

    def evaluate(
        self, engine: DeepSpeedEngine, watchdog: Watchdog, stop: Callable[[], bool]
    ) -> Callable[[Path, str], None] | None:
        """Run the model on the images; return the function that writes the picture."""
        watchdog.doing("drawing pictures")
        return self.draw(engine)

    def write(self, record: Record, step: int, outcome: Callable[[Path, str], None]) -> None:
        """Write the picture as a PNG."""
        record.add_picture(step, outcome)
