"""Loaders: batches in the order of the run, made ahead by worker processes.

The training stream is endless and starts at any step. What a step reads follows from its number
(`mae_scale.data.order`), so nothing here is saved or restored.
"""

from __future__ import annotations

import atexit
import logging
import math
import mmap
import os
import signal
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from mae_scale.config.sizes import ImageSize, sides
from mae_scale.data.augment import Augment
from mae_scale.data.bands import RGB, Bands
from mae_scale.data.cache import ShardCache
from mae_scale.data.dataset import (
    Batch,
    BatchKey,
    EvalDataset,
    TrainDataset,
)
from mae_scale.data.formats import MAX_PIXELS
from mae_scale.data.mixing import sorted_by_class
from mae_scale.data.order import SampleOrder, step_positions
from mae_scale.data.reader import shard_cache
from mae_scale.data.remote import shown
from mae_scale.data.shards import ShardSet, opened
from mae_scale.data.transforms import default_crop_ratio
from mae_scale.data.worker import STOP_SIGNALS, DataWorker
from mae_scale.errors import RunError, UserError

logger = logging.getLogger("mae_scale")

_PREFETCH = 2  # number of batches that each worker prepares ahead


class _Loader:
    """Iterator of a dataset over a stream of keys, in this process or in forked workers."""

    def __init__(
        self,
        dataset: TrainDataset | EvalDataset,
        batch_size: int,
        workers: int,
        pin_memory: bool,
    ) -> None:
        self._dataset = dataset
        self._batch_size = batch_size
        self._workers = workers
        self._pin_memory = pin_memory
        self._running: tuple[Any, mmap.mmap] | None = None

    def _batches(self, keys: Iterable[tuple[int, np.ndarray]]) -> Iterator[Batch]:
        """Yield the batches of (epoch, positions), in order."""
        self.close()
        size = self._dataset.img_size
        # There is one slot more than batches in preparation, because a slot is used again only
        # after its batch was copied and handed out.
        slots = self._workers * _PREFETCH + 1
        if self._workers:
            bands = self._dataset.bands.count
            self._dataset.slots = [
                _shared_images(self._batch_size, size, bands) for _ in range(slots)
            ]
        stop = mmap.mmap(-1, 1)
        loader: DataLoader = DataLoader(
            self._dataset,
            batch_size=None,
            sampler=(BatchKey(i % slots, *key) for i, key in enumerate(keys)),
            collate_fn=_as_it_is,
            num_workers=self._workers,
            prefetch_factor=_PREFETCH if self._workers else None,
            worker_init_fn=DataWorker(os.getpid(), stop),
            multiprocessing_context="fork" if self._workers else None,
            generator=torch.Generator(),  # the default would draw from the global one
        )
        # A signal to the whole process group must not reach a worker that does not ignore it yet.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            running = iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._running = running, stop
        # This runs before torch's own exit handler, which would wait for the workers, not end them.
        atexit.register(self.close)
        try:
            for batch in running:
                if isinstance(batch, Exception):
                    raise batch
                if self._workers and batch.images is None and "image" not in batch.targets:
                    shared = self._dataset.slots[batch.slot][: len(batch.labels)]
                    images = torch.empty_like(shared, pin_memory=self._pin_memory)
                    batch.images = images.copy_(shared)
                yield batch
        finally:
            if self._running is not None and self._running[0] is running:
                self.close()

    def close(self) -> None:
        """End the workers and free what they share. The loader can be iterated again."""
        if self._running is not None and self._workers:
            running, stop = self._running
            stop[0] = 1
            running._shutdown_workers()
        self._running = None
        self._dataset.slots = ()
        self._dataset.reader.close()
        atexit.unregister(self.close)


class TrainLoader(_Loader):
    """The endless training stream of one rank: micro-batches, from any step on.

    The samples that a step reads depend neither on the number of ranks and workers nor on the
    micro-batch. A damaged sample is named in the log once and replaced by another one.

    Args:
        shards: shards of the split, or their folder as `open_shards` takes it.
        img_size: pixels of a side, or height and width.
        global_batch_size: samples of a step over all ranks; a multiple of
            `micro_batch_size` x `world_size`.
        micro_batch_size: samples of a batch that this loader yields; None: a rank's whole share.
        seed, lanes, window: arguments of the order, see `SampleOrder`.
        rank, world_size: number of this process, and number of processes, which share each step.
        workers: number of processes that decode; 0 decodes in this one.
        start_step: first step to yield, counted from 0.
        pin_memory: whether to put images into page-locked memory.
        cache_dir, cache_bytes: folder for staging remote shards, and its largest size in bytes.
        max_bad_fraction: share of the dataset's samples that may be damaged before the run ends.
        augment: random changes of images; None: pre-training's crop and flip.
        repeats: number of images that a step makes of each of its samples, with different crops
            (repeated augmentation); a divisor of `micro_batch_size`. An epoch is one pass over
            the samples, so it has `repeats` times as many images and steps.
        max_pixels: a larger image counts as damaged.
        bands: how images are decoded.

    Raises:
        UserError: a batch has more samples than the dataset, or cannot be divided as asked.
    """

    def __init__(
        self,
        shards: ShardSet | str | Path,
        img_size: ImageSize,
        global_batch_size: int,
        *,
        micro_batch_size: int | None = None,
        seed: int = 0,
        lanes: int = 256,
        window: int = 2048,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        start_step: int = 0,
        pin_memory: bool = False,
        cache_dir: str | Path | None = None,
        cache_bytes: int | None = None,
        max_bad_fraction: float = 1e-4,
        augment: Augment | None = None,
        repeats: int = 1,
        max_pixels: int = MAX_PIXELS,
        bands: Bands = RGB,
    ) -> None:
        shards = opened(shards, cache_dir)
        order = self._order(shards, seed, lanes, window)
        if micro_batch_size is None:
            micro_batch_size = max(1, global_batch_size // world_size)
        if global_batch_size % (micro_batch_size * world_size):
            raise UserError(
                f"a global batch of {global_batch_size} does not divide into micro-batches of "
                f"{micro_batch_size} on {world_size} ranks"
            )
        if micro_batch_size % repeats:
            raise UserError(
                f"a micro-batch of {micro_batch_size} does not divide into samples of which each "
                f"comes {repeats} times"
            )
        self._samples_per_step = global_batch_size // repeats
        self.steps_per_epoch = len(order) // self._samples_per_step
        if self.steps_per_epoch == 0:
            times = f", each {repeats} times" if repeats > 1 else ""
            raise UserError(
                f"{shards.root} holds {len(order)} samples{times}, fewer than one global batch "
                f"of {global_batch_size}"
            )
        cache = shard_cache(shards, cache_dir, cache_bytes)
        if cache is not None and cache_bytes is not None:
            # A window of a lane usually lies in two shards, and all lanes are read at the same
            # time.
            need = min(int(shards.bytes.sum()), 2 * lanes * int(shards.bytes.max()))
            if cache_bytes < need:
                logger.warning(
                    "cache_dir may take %.3g GB, but %d lanes of %s are read at a time out of "
                    "up to %.3g GB: it will take more, or shards will be fetched again and again; "
                    "raise cache_gb or lower lanes",
                    cache_bytes / 1e9, lanes, shards.root, need / 1e9,
                )  # fmt: skip
        dataset = self._make_dataset(shards, img_size, order, cache, augment)
        if repeats > 1 and not dataset.can_repeat:
            raise UserError(f"repeats {repeats}: samples with annotations come once a step")
        dataset.repeats, dataset.max_pixels, dataset.bands = repeats, max_pixels, bands
        if rank == 0 and (text := sorted_by_class(shards, order, self._samples_per_step)):
            logger.warning("%s", text)
        super().__init__(
            dataset,
            micro_batch_size,
            workers,
            pin_memory,
        )
        self._shards = shards
        self._repeats = repeats
        self._rank, self._world_size = rank, world_size
        self._start_step = start_step
        self._max_bad_fraction = max_bad_fraction
        self._bad: set[int] = set()

    def _order(self, shards: ShardSet, seed: int, lanes: int, window: int) -> SampleOrder:
        return SampleOrder(shards.samples, seed, lanes, window)

    def _make_dataset(
        self,
        shards: ShardSet,
        img_size: ImageSize,
        order: SampleOrder,
        cache: ShardCache | None,
        augment: Any,
    ) -> TrainDataset:
        return TrainDataset(shards, img_size, order, cache, augment)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yield the stream from `start_step` on, see `batches`."""
        return self.batches(self._start_step)

    def batches(self, start_step: int) -> Iterator[dict[str, torch.Tensor]]:
        """Yield dicts, one for each micro-batch, from a step on (counted from 0), without end.

        "image" uint8 [b, C, H, W] (channels_last), "label", "epoch" and "sample" int64 [b].
        "sample" is the global id (manifest order) of the sample that was really used. "epoch"
        decides the random draws of an image, and differs between the views of a sample (see
        `draw_epochs`).

        Raises:
            UserError: a shard has changed since it was indexed.
            OSError: a shard cannot be read or fetched.
            RunError: too many samples are damaged.
        """
        for batch in self._batches(self._keys(start_step)):
            self._count_damaged(batch.damaged)
            yield _as_tensors(batch)

    def name_of(self, sample: int) -> str:
        """Return shard and member of a sample id, for messages; this reads the member's header."""
        shard = int(np.searchsorted(self._shards.starts, sample, side="right")) - 1
        name = self._dataset.reader.read(sample).name
        return f"{shown(self._shards.files[shard]).rpartition('/')[2]}/{name}"

    @property
    def bad_samples(self) -> int:
        """Number of different damaged samples that this rank has found."""
        return len(self._bad)

    def _keys(self, start_step: int) -> Iterator[tuple[int, np.ndarray]]:
        for step in count(start_step):
            epoch, positions = step_positions(
                step, self.steps_per_epoch, self._samples_per_step, self._rank, self._world_size
            )
            batch = self._batch_size // self._repeats  # number of samples
            for start in range(0, len(positions), batch):
                yield epoch, positions[start : start + batch]

    def _count_damaged(self, damaged: dict[int, str]) -> None:
        for sample, what in damaged.items():
            if sample not in self._bad:
                self._bad.add(sample)
                logger.warning(
                    "%s: sample %d: %s; another one takes its place",
                    self._shards.root,
                    sample,
                    what,
                )
        if len(self._bad) > self._max_bad_fraction * len(self._shards):
            self.close()
            raise RunError(
                f"{self._shards.root}: {len(self._bad)} of {len(self._shards)} samples are "
                f"damaged, more than max_bad_fraction = {self._max_bad_fraction:g} allows; "
                "`mae-scale verify` names them all"
            )


class EvalLoader(_Loader):
    """One pass over all samples, each on exactly one rank, the last batch included.

    A rank reads a contiguous part of the manifest's order. The parts differ by one sample at most,
    so ranks may have different numbers of batches.

    Args:
        shards: shards of the split, or their folder as `open_shards` takes it.
        img_size: pixels of a side, or height and width.
        batch_size: samples of a batch; the last one of a rank may be smaller.
        rank, world_size: number of this process, and number of processes, which share the samples.
        workers: number of processes that decode; 0 decodes in this one.
        crop_ratio: share of the short side that is cropped, see `eval_crop`; by default the
            official 0.875 up to 224 pixels, 1.0 above.
        pin_memory, cache_dir, cache_bytes: as for `TrainLoader`.
        max_pixels: a larger image is an error.
        bands: how images are decoded.

    Attributes:
        img_size, batch_size, bands: arguments of the same names.
        num_samples: number of samples of the set, over all ranks.
        most_batches: largest number of batches of any rank.
    """

    def __init__(
        self,
        shards: ShardSet | str | Path,
        img_size: ImageSize,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        crop_ratio: float | None = None,
        pin_memory: bool = False,
        cache_dir: str | Path | None = None,
        cache_bytes: int | None = None,
        max_pixels: int = MAX_PIXELS,
        bands: Bands = RGB,
    ) -> None:
        shards = opened(shards, cache_dir)
        if crop_ratio is None:
            crop_ratio = default_crop_ratio(img_size)
        cache = shard_cache(shards, cache_dir, cache_bytes)
        dataset = self._make_dataset(shards, img_size, crop_ratio, cache)
        dataset.max_pixels, dataset.bands = max_pixels, bands
        super().__init__(dataset, batch_size, workers, pin_memory)
        n = len(shards)
        self._samples = np.arange(rank * n // world_size, (rank + 1) * n // world_size)
        self.img_size, self.batch_size, self.bands = img_size, batch_size, bands
        self.num_samples = n
        self.most_batches = math.ceil(math.ceil(n / world_size) / batch_size)

    def _make_dataset(
        self, shards: ShardSet, img_size: ImageSize, crop_ratio: float, cache: ShardCache | None
    ) -> EvalDataset:
        return EvalDataset(shards, img_size, crop_ratio, cache)

    def __len__(self) -> int:
        """Return the number of batches of this rank."""
        return -(-len(self._samples) // self._batch_size)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yield dicts as `TrainLoader` does; "epoch" is 0.

        Raises:
            UserError: a sample is damaged, or a shard has changed since it was indexed.
            OSError: a shard cannot be read or fetched.
        """
        starts = range(0, len(self._samples), self._batch_size)
        keys = ((0, self._samples[start : start + self._batch_size]) for start in starts)
        for batch in self._batches(keys):
            yield _as_tensors(batch)


def _shared_images(batch_size: int, size: ImageSize, bands: int) -> torch.Tensor:
    """Return uint8 [batch_size, bands, H, W] (channels_last) in memory that forks share."""
    shape = (batch_size, *sides(size), bands)
    memory = mmap.mmap(-1, math.prod(shape))
    images = torch.frombuffer(memory, dtype=torch.uint8).view(shape)
    return images.permute(0, 3, 1, 2)


def _as_it_is(batch: Any) -> Any:
    return batch


def _as_tensors(batch: Batch) -> dict[str, torch.Tensor]:
    return {
        **({} if batch.images is None else {"image": batch.images}),
        "label": torch.from_numpy(batch.labels),
        "epoch": torch.from_numpy(batch.epochs),
        "sample": torch.from_numpy(batch.samples),
        **{key: torch.from_numpy(value) for key, value in batch.targets.items()},
    }
