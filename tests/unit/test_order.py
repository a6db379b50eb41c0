"""The sample order: each sample once, for any ranks, workers and first step."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mae_scale.data.order import SampleOrder, step_positions
from mae_scale.errors import UserError

# Shards of one sample, of very different sizes, and empty ones; fewer shards than lanes, and
# fewer samples than lanes, come up by themselves.
shard_sizes = st.lists(
    st.one_of(st.just(1), st.integers(0, 5), st.integers(0, 400)), min_size=1, max_size=20
).filter(sum)
orders = st.builds(
    lambda sizes, seed, lanes, window: SampleOrder(np.array(sizes), seed, lanes, window),
    shard_sizes,
    st.integers(0, 2**63 - 1),
    st.integers(1, 70),
    st.integers(1, 500),
)
epochs = st.integers(0, 2000)


def whole_epoch(order: SampleOrder, epoch: int) -> np.ndarray:
    return order.samples(epoch, np.arange(len(order)))


@given(orders, epochs)
def test_an_epoch_holds_every_sample_exactly_once(order: SampleOrder, epoch: int) -> None:
    assert np.array_equal(np.sort(whole_epoch(order, epoch)), np.arange(len(order)))


@given(orders, epochs, st.data())
def test_any_positions_in_any_order_agree_with_the_whole(
    order: SampleOrder, epoch: int, data: st.DataObject
) -> None:
    whole = whole_epoch(order, epoch)
    fresh = SampleOrder(order.shard_samples, order.seed, order.lanes, order.window)
    start = data.draw(st.integers(0, len(order) - 1))
    assert np.array_equal(fresh.samples(epoch, np.arange(start, len(order))), whole[start:])
    some = np.array(data.draw(st.lists(st.integers(0, len(order) - 1), max_size=30)), np.int64)
    assert np.array_equal(fresh.samples(epoch, some), whole[some])


@given(orders, epochs, st.data())
@settings(deadline=None)
def test_a_step_reads_the_same_at_every_world_size(
    order: SampleOrder, epoch: int, data: st.DataObject
) -> None:
    world_sizes = data.draw(st.lists(st.integers(1, 64), min_size=1, max_size=3))
    batch = int(np.lcm.reduce(world_sizes)) * data.draw(st.integers(1, 3))
    steps_per_epoch = len(order) // batch
    if steps_per_epoch == 0:
        return
    step = epoch * steps_per_epoch + data.draw(st.integers(0, steps_per_epoch - 1))
    alone = order.samples(*step_positions(step, steps_per_epoch, batch, 0, 1))
    for world_size in world_sizes:
        parts = [
            order.samples(*step_positions(step, steps_per_epoch, batch, rank, world_size))
            for rank in range(world_size)
        ]
        assert {len(part) for part in parts} == {batch // world_size}
        # Not only the same set: rank by rank, in the order of the positions.
        first = (step % steps_per_epoch) * batch
        together = np.empty(batch, np.int64)
        for rank, part in enumerate(parts):
            together[(np.arange(first, first + batch) % world_size) == rank] = part
        assert np.array_equal(together, alone)


@pytest.mark.parametrize("world_size", range(1, 65))
def test_the_steps_of_an_epoch_read_each_sample_once_at_world_size(world_size: int) -> None:
    order = SampleOrder(np.array([1, 900, 3, 0, 1, 2500, 77]), 5, lanes=48, window=100)
    batch = 2 * world_size
    steps_per_epoch = len(order) // batch
    seen = [
        order.samples(
            *step_positions(3 * steps_per_epoch + s, steps_per_epoch, batch, r, world_size)
        )
        for s in range(steps_per_epoch)
        for r in range(world_size)
    ]
    assert np.array_equal(
        np.sort(np.concatenate(seen)), np.sort(whole_epoch(order, 3)[: steps_per_epoch * batch])
    )


def test_the_order_is_the_one_that_design_describes() -> None:
    """The order equals the rule of docs/design.md, written out sample by sample."""
    from mae_scale.randomness import Purpose, permutation

    sizes, seed, lanes, window, epoch = [3, 1, 10, 6, 8], 11, 4, 3, 2
    first = np.concatenate([[0], np.cumsum(sizes)])
    line = [
        int(first[shard]) + i
        for shard in permutation(len(sizes), Purpose.SHARD_ORDER, seed, epoch)
        for i in range(sizes[shard])
    ]
    lane_lines, start = [], 0
    for lane in range(lanes):
        length = len(range(lane, len(line), lanes))
        lane_lines.append(line[start : start + length])
        start += length
    expected = []
    for position in range(len(line)):
        lane, place = position % lanes, position // lanes
        number, within = divmod(place, window)
        part = lane_lines[lane][number * window : (number + 1) * window]
        order = permutation(len(part), Purpose.WINDOW_ORDER, seed, epoch, lane, number)
        expected.append(part[order[within]])
    got = whole_epoch(SampleOrder(np.array(sizes), seed, lanes, window), epoch)
    assert got.tolist() == expected


def test_epochs_and_seeds_differ() -> None:
    sizes = np.full(8, 50)
    base = whole_epoch(SampleOrder(sizes, 0, 8, 20), 0)
    for seed, epoch in [(0, 1), (1, 0), (0, 1599)]:
        other = whole_epoch(SampleOrder(sizes, seed, 8, 20), epoch)
        assert np.mean(base == other) < 0.05


def test_a_rank_that_divides_the_lanes_reads_few_shards() -> None:
    order = SampleOrder(np.full(520, 2464), 0, lanes=64, window=2048)
    steps_per_epoch = len(order) // 4096
    shards = set()
    for step in range(20):  # 10,240 samples of rank 3 of 8: 8 lanes, 1,280 samples of each
        samples = order.samples(*step_positions(step, steps_per_epoch, 4096, 3, 8))
        shards |= set((samples // 2464).tolist())
    assert len(shards) <= 2 * 8


def test_memory_does_not_grow_with_the_samples() -> None:
    """A billion samples in a million shards need arrays of the shards' length, none of the
    samples'."""
    shards = np.full(1_000_000, 1_000, np.int64)
    tracemalloc.start()
    try:
        order = SampleOrder(shards, 7, lanes=256, window=4096)
        n = len(order)
        for epoch, start in [(0, 0), (0, n // 2), (1, n - 4096), (500, n * 95 // 100)]:
            samples = order.samples(epoch, np.arange(start, start + 4096))
            assert len(np.unique(samples)) == 4096
            assert samples.min() >= 0
            assert samples.max() < n
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert n == 10**9
    assert peak < 150 * 2**20  # one int64 for each sample would be 8 GB


def test_the_windows_that_are_kept_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mae_scale.data.order._KEPT_ENTRIES", 1000)
    order = SampleOrder(np.full(100, 100), 7, lanes=8, window=300)
    whole = whole_epoch(order, 0)
    assert sum(map(len, order._windows.values())) <= 1000
    assert np.array_equal(whole_epoch(order, 0), whole)


def test_positions_outside_the_epoch_are_refused() -> None:
    order = SampleOrder(np.array([10]), 0, 2, 4)
    assert order.samples(0, np.array([], np.int64)).shape == (0,)
    for bad in (-1, 10):
        with pytest.raises(IndexError, match="an epoch of 10 samples"):
            order.samples(0, np.array([bad]))


@pytest.mark.parametrize(("lanes", "window"), [(0, 1), (1, 0), (-3, 5)])
def test_lanes_and_windows_below_one_are_refused(lanes: int, window: int) -> None:
    with pytest.raises(UserError, match=r"^(lanes|window) is"):
        SampleOrder(np.array([10]), 0, lanes, window)
