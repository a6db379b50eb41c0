"""The part of validation that all tasks share: it also measures the moving average of weights."""

from __future__ import annotations

from collections.abc import Callable

from mae_scale.config.sections import RunConfig
from mae_scale.launch.watchdog import Watchdog
from mae_scale.tasks.task import AVERAGED, TASKS
from mae_scale.train.ds import DeepSpeedEngine
from mae_scale.train.loop import Validation
from mae_scale.train.validation import averaged_weights

# Function that measures the weights in an engine. It returns their scores by name, or None where
# the function that it is given has said stop.
Measure = Callable[[DeepSpeedEngine, Watchdog, Callable[[], bool]], dict[str, float] | None]


def validation_by(config: RunConfig, every_epochs: int, scores: Measure) -> Validation:
    """Make a validation of the weights and of their moving average, where the optimiser keeps one.

    Args:
        config: config of the run.
        every_epochs: epochs between two validations.
        scores: function that measures the weights in the engine.
    """
    task, averages = TASKS[config.task], config.optim.average_decay is not None

    def run(
        engine: DeepSpeedEngine, watchdog: Watchdog, stop: Callable[[], bool]
    ) -> dict[str, float] | None:
        own = scores(engine, watchdog, stop)
        if own is None or not averages:
            return own
        with averaged_weights(engine):
            average = scores(engine, watchdog, stop)
        if average is None:
            return None
        return own | {AVERAGED + key: average[key] for key in task.scores}

    return Validation(every_epochs, run, (AVERAGED if averages else "") + task.best_by)
