"""Validations and pictures, which a run makes now and then besides training.

Both are the same to the loop: it asks whether one is due, evaluates the model, writes down what
came out, and leaves the time that it took out of the rates.
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
    epochs: int
    total_steps: int
    """Number of steps of the whole run; `train.max_steps` may end it before its last epoch."""


class Evaluation(Protocol):
    """Something that a run does now and then with its model."""

    def is_due(self, step: int, schedule: Schedule) -> bool:
        """Say whether the evaluation is due when `step` steps are done."""
        ...

    def evaluate(
        self, engine: DeepSpeedEngine, watchdog: Watchdog, stop: Callable[[], bool]
    ) -> Any | None:
        """Do it, on all ranks; None if there is nothing to write down or `stop` said yes."""
        ...

    def write(self, record: Record, step: int, outcome: Any) -> None:
        """Write down, on rank 0, what `evaluate` gave."""
        ...


@dataclass
class Validation:
    """Measures the model on a data set."""

    every_epochs: int | None
    """The last epoch counts, too; None: `every_steps` decides."""
    run: Callable[[DeepSpeedEngine, Watchdog, Callable[[], bool]], dict[str, float] | None]
    """Gives scores, the same on all ranks; None where the function it is given has said stop."""
    best_by: str | None
    """The score whose highest value makes the best checkpoint; None: the newest stays the best."""
    every_steps: int | None = None
    """Optimiser steps between two of them; the last step of the run counts, too."""

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
        """Measure the model; None if a signal came in between."""
        return self.run(engine, watchdog, stop)

    def write(self, record: Record, step: int, outcome: dict[str, float]) -> None:
        """Add a row to validation.jsonl."""
        record.add_validation(step, outcome)


@dataclass
class Pictures:
    """Draws what the model makes of some images."""

    every_steps: int
    """The last step of the run counts, too."""
    draw: Callable[[DeepSpeedEngine], Callable[[Path, str], None] | None]
    """All ranks call; rank 0 uses what it gives to write a PNG with a title. None: no picture."""

    def is_due(self, step: int, schedule: Schedule) -> bool:
        """Say whether pictures are to be drawn when `step` steps are done."""
        return step == schedule.total_steps or step % self.every_steps == 0

    def evaluate(
        self, engine: DeepSpeedEngine, watchdog: Watchdog, stop: Callable[[], bool]
    ) -> Callable[[Path, str], None] | None:
        """Run the model on the images."""
        watchdog.doing("drawing pictures")
        return self.draw(engine)

    def write(self, record: Record, step: int, outcome: Callable[[Path, str], None]) -> None:
        """Write the PNG."""
        record.add_picture(step, outcome)
