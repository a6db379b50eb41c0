"""Copying batches to the GPU, each while the step before it is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch

Batch = dict[str, torch.Tensor]
Given = TypeVar("Given")
Made = TypeVar("Made")


@contextmanager
def ahead(
    items: Iterator[Given],
    make: Callable[[Given], Made],
    begin: Callable[[], None] = lambda: None,
) -> Iterator[Iterator[Made]]:
    """Apply `make` to each item of a stream; while one result is used, a thread makes the next one.

    The caller's thread makes the first one, and thereby starts the data workers. An error in the
    stream is raised where its item would have come. Leaving the context does not wait for the
    thread.

    Args:
        items: stream of items, which nothing else may read from then on.
        make: function that is called for each item, in the order of the stream.
        begin: function that is called once in the thread.

    Yields:
        The stream of results.
    """
    pool = ThreadPoolExecutor(1, "upload", initializer=begin)

    def make_one() -> tuple[Made] | None:
        for item in items:
            return (make(item),)
        return None

    def stream() -> Iterator[Made]:
        made = make_one()
        while made is not None:
            coming = pool.submit(make_one)
            yield made[0]
            made = coming.result()

    try:
        yield stream()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def uploads(
    batches: Iterator[Batch], device: torch.device, workers: int
) -> Iterator[Iterator[Batch]]:
    """Copy batches to the device of a run; on a CPU they stay where they are.

    On a GPU a thread receives the next batch from the data workers, pins it and copies it. The GPU
    copies while it computes; only the step that uses the batch waits for the copy, and it waits on
    the GPU. Without data workers no thread is used: decoding draws random numbers from generators
    that the main thread seeds.

    Args:
        batches: stream of batches in host memory.
        device: device of this rank.
        workers: number of data-loading processes of this rank.

    Yields:
        The stream of batches on the device.
    """
    if device.type != "cuda":
        yield batches
        return
    copies = torch.cuda.Stream(device)

    def copy(batch: Batch) -> tuple[Batch, torch.cuda.Event]:
        with torch.cuda.stream(copies):
            moved = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
            there = torch.cuda.Event()
            there.record()
        return moved, there

    def used(stream: Iterator[tuple[Batch, torch.cuda.Event]]) -> Iterator[Batch]:
        for moved, there in stream:
            now = torch.cuda.current_stream(device)
            now.wait_event(there)
            for value in moved.values():
                value.record_stream(now)
            yield moved

    if workers == 0:
        yield used(map(copy, batches))
        return
    # A new thread would pin memory through the first GPU, and take memory there.
    with ahead(batches, copy, partial(torch.cuda.set_device, device)) as stream:
        yield used(stream)
