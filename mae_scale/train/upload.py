"""Batches on their way to the GPU, one ahead of the step that needs them."""

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
    """Give what `make` gives for each item of a stream; a thread makes the next one meanwhile.

    The first item is made by the caller's thread, which so starts the data workers. An error in the
    stream is raised where its item would have come. At the end nothing is waited for.

    Args:
        items: the stream, which nobody else reads from then on.
        make: called for each item, in the order of the stream.
        begin: called once in the thread.
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
    """Give batches on the device of a run. Those on a CPU stay as they are.

    On a GPU the next batch is received from the data workers, pinned and copied by a thread. The
    copy goes beside what the GPU computes; only the step that uses the batch waits for it, and it
    does so on the GPU. Without data workers no thread is used: decoding draws random numbers from
    generators that the main thread seeds.
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
    # A new thread would pin memory by way of the first GPU, and take room there.
    with ahead(batches, copy, partial(torch.cuda.set_device, device)) as stream:
        yield used(stream)
