"""A check that batches hold about as many classes as they would if images were mixed."""

from __future__ import annotations

import numpy as np

from mae_scale.data.order import SampleOrder
from mae_scale.data.shards import ShardSet

_MOST_SAMPLES = 100_000_000  # labels are not counted in larger sets
_FEW, _ENOUGH = 0.5, 0.8  # shares of the number of classes in a mixed batch
_MOST_LANES = 65_536


def sorted_by_class(shards: ShardSet, order: SampleOrder, batch: int) -> str | None:
    """Return a warning if the first batch holds few classes, with a number of lanes that helps.

    A batch holds few classes if tars are sorted by class and few places of them are read at a time.

    Args:
        batch: number of samples of a step.
    """
    if len(shards) > _MOST_SAMPLES:
        return None
    labels = np.asarray(shards.index["label"])
    known = labels[labels >= 0]
    share = np.bincount(known) / max(1, len(known))
    expected = float((1 - (1 - share) ** batch).sum())
    if len(known) < len(labels) or expected < 3:
        return None
    seen = _classes(labels, order, batch)
    if seen >= _FEW * expected:
        return None
    lanes, text = order.lanes, "mix them anew with `mae-scale shard`"
    while (lanes := 2 * lanes) <= min(_MOST_LANES, len(shards)):
        other = SampleOrder(shards.samples, order.seed, lanes, order.window)
        if _classes(labels, other, batch) >= _ENOUGH * expected:
            text = f"set lanes to {lanes}"
            break
    return (
        f"{shards.root} is sorted by class, and {order.lanes} lanes of it are read at a time: a "
        f"batch of {batch} holds {seen} classes, where a mixed one would hold about "
        f"{expected:.0f}; {text}"
    )


def _classes(labels: np.ndarray, order: SampleOrder, batch: int) -> int:
    samples = order.samples(0, np.arange(min(batch, len(order))))
    return len(np.unique(labels[samples]))
