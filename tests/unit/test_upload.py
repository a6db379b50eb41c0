"""Batches that a thread makes ahead."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import count

import pytest
import torch

from mae_scale.train.upload import ahead, uploads


def test_one_item_is_made_ahead_by_a_thread() -> None:
    """The caller makes the first item, so that the data workers are started by it."""
    made: dict[int, str] = {}
    second_is_made, begun = threading.Event(), []

    def make(item: int) -> int:
        made[item] = threading.current_thread().name
        if item == 1:
            second_is_made.set()
        return 10 * item

    with ahead(count(), make, lambda: begun.append(threading.current_thread().name)) as stream:
        assert next(stream) == 0
        assert second_is_made.wait(60)  # without being asked for
        assert next(stream) == 10 and next(stream) == 20
        assert not set(made) & {4, 5}
    assert made[0] == threading.current_thread().name
    assert made[1] == made[2] == begun[0] != made[0]


def test_the_end_and_errors_come_in_their_places() -> None:
    def stream() -> Iterator[int]:
        yield from range(3)
        raise OSError("a shard is gone")

    with ahead(iter(range(3)), lambda item: item) as items:
        assert list(items) == [0, 1, 2]
    with ahead(stream(), lambda item: item) as items:
        assert [next(items) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(OSError, match="a shard is gone"):
            next(items)


def test_the_end_waits_for_nothing() -> None:
    """The end does not wait for a data worker that hangs."""
    goes_on = threading.Event()

    def make(item: int) -> int:
        if item:
            assert goes_on.wait(60)
        return item

    with ahead(count(), make) as stream:
        next(stream)
    goes_on.set()


def test_batches_on_a_cpu_stay_as_they_are() -> None:
    batches = iter([{"image": torch.zeros(1)}])
    with uploads(batches, torch.device("cpu"), workers=2) as stream:
        assert stream is batches
