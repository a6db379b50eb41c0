"""A trace of a few steps, for chrome://tracing or Perfetto (`train.profile`)."""

from __future__ import annotations

import logging
import re
from contextlib import suppress
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from mae_scale.config.sections import TrainConfig
from mae_scale.errors import UserError
from mae_scale.files import owner
from mae_scale.launch.watchdog import Watchdog

log = logging.getLogger("mae_scale")


def profiled_steps(train: TrainConfig) -> tuple[int, int] | None:
    """Return the first and last step of `train.profile`, counted from 1; None if it is not set.

    Raises:
        UserError: `train.profile` is not START-STOP.
    """
    if train.profile is None:
        return None
    found = re.fullmatch(r"(\d+)-(\d+)", train.profile)
    first, last = map(int, found.groups()) if found else (0, 0)
    if not 1 <= first <= last:
        raise UserError(
            f"train.profile {train.profile!r} must be START-STOP, the first and the last step of "
            "the trace counted from 1, such as 10-12"
        )
    return first, last


class StepProfiler:
    """Writes `RUN/profile/steps-START-STOP-rank-R.json.gz`, each rank its own.

    A run that begins within these steps, or is stopped within them, writes nothing.

    Args:
        steps: first and last step of the trace, counted from 1; None: no trace is written.
        run_dir: folder of the run.
        rank: rank of this process.
        watchdog: watchdog that is told when a trace is being written.
    """

    def __init__(
        self, steps: tuple[int, int] | None, run_dir: Path, rank: int, watchdog: Watchdog
    ) -> None:
        self._watchdog = watchdog
        self._first, self._last = steps or (0, 0)  # there is no step 0
        name = f"steps-{self._first}-{self._last}-rank-{rank}.json.gz"
        self._path = run_dir / "profile" / name
        self._profile: profile | None = None
        self._on = False

    def before(self, step: int) -> None:
        """Note that a step begins, and start the profiler with the first step of the trace.

        Preparing the profiler takes time. It is done one step earlier, if there is such a step.
        """
        if self._profile is None and step in (self._first - 1, self._first) and step > 0:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities)
            self._profile.prepare_trace()
        if self._profile is not None and step == self._first:
            self._profile.start_trace()
            self._on = True

    def ends_with(self, step: int) -> bool:
        """Return whether `step` is the last step of the trace, so that `write` is to be called."""
        return self._on and step == self._last

    def write(self) -> None:
        """Write the trace, whole or not at all."""
        assert self._profile is not None
        self._watchdog.doing(f"writing {self._path.name}")
        self._profile.stop_trace()
        self._on = False
        temporary = self._path.with_name(f".{owner()}.{self._path.name}")
        try:
            self._path.parent.mkdir(exist_ok=True)
            self._profile.export_chrome_trace(str(temporary))
            temporary.replace(self._path)
        except OSError as error:  # no reason to end a run
            log.warning("%s cannot be written: %s", self._path, error)
        finally:
            with suppress(OSError):
                temporary.unlink()

    def close(self) -> None:
        """Stop the profiler if it is still running."""
        if self._on and self._profile is not None:
            self._profile.stop_trace()
            self._on = False
