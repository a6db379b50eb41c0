"""The order in which an epoch visits the samples: a pure function of (seed, epoch, position).

Nothing is stored and nothing is advanced: the last position of an epoch costs as much as the first
one, so a run goes on anywhere without reading again the samples that it has seen. The order does
not know of ranks, workers or accumulation; the loader decides which process reads which position
(`mae_scale.data.loader`).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mae_scale.errors import UserError
from mae_scale.randomness import Purpose, hash64, permutation

Int64Array = npt.NDArray[np.int64]

# Largest number of entries of all kept window permutations together (32 MiB). This suffices for all
# windows that a rank has open at once, with any usual `lanes` and `window` and any dataset.
_KEPT_ENTRIES = 4 * 2**20


class _Line(NamedTuple):
    """The shards of one epoch, permuted and laid end to end."""

    shards: Int64Array  # [num_shards], shard numbers in the order of the line
    starts: Int64Array  # [num_shards + 1], place on the line where each shard begins


class SampleOrder:
    """The sample at each position of an epoch.

    An epoch permutes the shards and lays their N samples in one line. The line is cut into
    `lanes` pieces whose lengths differ by one at most; position p lies in lane p mod `lanes`, so
    that neighbouring positions come from all over the dataset. Each lane is shuffled in windows
    of `window` samples, so that a reader of one lane goes through few shards at a time.

    Args:
        shard_samples: int64 [num_shards], number of samples in each shard.
        seed: seed of the run.
        lanes: number of pieces of the line. If the number of ranks divides it, each rank reads
            nearly in sequence.
        window: number of samples that are shuffled together within a lane.

    Memory is O(num_shards), and does not grow with the number of samples.
    """

    def __init__(self, shard_samples: Int64Array, seed: int, lanes: int, window: int) -> None:
        if lanes < 1:
            raise UserError(f"lanes is {lanes}; it must be 1 or more")
        if window < 1:
            raise UserError(f"window is {window}; it must be 1 or more")
        self.shard_samples = np.asarray(shard_samples, dtype=np.int64)
        self.seed, self.lanes, self.window = seed, lanes, window
        self._starts = _cumulative(self.shard_samples)
        self._line: tuple[int, _Line] | None = None
        self._windows: OrderedDict[tuple[int, int, int], npt.NDArray[np.int64]] = OrderedDict()
        self._kept = 0

    def __len__(self) -> int:
        """Return the number of samples of an epoch."""
        return int(self._starts[-1])

    def samples(self, epoch: int, positions: npt.ArrayLike) -> Int64Array:
        """Return the global sample ids (manifest order) at `positions` of an epoch.

        Args:
            epoch: number of the epoch, from 0.
            positions: int64 [n], each in [0, N), in any order.

        Returns:
            int64 [n], global sample ids.

        Raises:
            IndexError: a position lies outside the epoch.
        """
        p = np.asarray(positions, dtype=np.int64)
        n = len(self)
        if p.size and (p.min() < 0 or p.max() >= n):
            raise IndexError(f"positions {p.min()}..{p.max()} of an epoch of {n} samples")
        lane, place = p % self.lanes, p // self.lanes
        window, within = place // self.window, place % self.window

        # There is one permutation for each (lane, window) that the positions touch.
        within = within.copy()
        touched = np.lexsort((window, lane))
        change = (np.diff(lane[touched]) != 0) | (np.diff(window[touched]) != 0)
        for group in np.split(touched, np.flatnonzero(change) + 1) if p.size else []:
            of_window = self._window(epoch, int(lane[group[0]]), int(window[group[0]]))
            within[group] = of_window[within[group]]

        lane_start = lane * (n // self.lanes) + np.minimum(lane, n % self.lanes)
        on_line = lane_start + window * self.window + within
        line = self._epoch_line(epoch)
        i = np.searchsorted(line.starts, on_line, side="right") - 1
        return self._starts[line.shards[i]] + on_line - line.starts[i]

    def replacement(self, epoch: int, sample: int, attempt: int) -> int:
        """Draw the sample id that replaces a damaged sample; `attempt` counts the draws, from 0."""
        key = hash64(Purpose.REPLACEMENT, self.seed, epoch, sample, attempt)
        return int(key % np.uint64(len(self)))

    def _epoch_line(self, epoch: int) -> _Line:
        if self._line is None or self._line[0] != epoch:
            shards = permutation(len(self.shard_samples), Purpose.SHARD_ORDER, self.seed, epoch)
            self._line = epoch, _Line(shards, _cumulative(self.shard_samples[shards]))
        return self._line[1]

    def _window(self, epoch: int, lane: int, window: int) -> npt.NDArray[np.int64]:
        key = epoch, lane, window
        if key in self._windows:
            self._windows.move_to_end(key)
            return self._windows[key]
        lane_samples = (len(self) - lane + self.lanes - 1) // self.lanes
        size = min(self.window, lane_samples - window * self.window)
        order = permutation(size, Purpose.WINDOW_ORDER, self.seed, epoch, lane, window)
        self._windows[key] = order
        self._kept += size
        while self._kept > _KEPT_ENTRIES and len(self._windows) > 1:
            self._kept -= len(self._windows.popitem(last=False)[1])
        return order


def _cumulative(counts: Int64Array) -> Int64Array:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


def step_positions(
    step: int, steps_per_epoch: int, global_batch_size: int, rank: int, world_size: int
) -> tuple[int, Int64Array]:
    """Return the positions that one rank reads at one step.

    Step t takes the `global_batch_size` positions behind those of step t - 1; the incomplete batch
    at the end of an epoch is left out. A rank takes the positions p with p mod `world_size` =
    `rank`.

    Args:
        step: number of the step, from 0.
        steps_per_epoch: number of full batches of an epoch.
        global_batch_size: number of samples of a step, over all ranks.
        rank, world_size: number of this process, and number of processes.

    Returns:
        The epoch, and the positions in it, int64, ascending.
    """
    epoch, batch = divmod(step, steps_per_epoch)
    positions = np.arange(batch * global_batch_size, (batch + 1) * global_batch_size)
    return epoch, positions[positions % world_size == rank]
