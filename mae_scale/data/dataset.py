"""Batches of decoded, cropped pixels out of shards, read by offset.

This code runs in the data workers. It holds no state that matters: a batch follows from the
requested positions alone, whichever worker makes it and whenever.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from isal.isal_zlib import crc32

from mae_scale.config.sizes import ImageSize, sides
from mae_scale.data.augment import Augment
from mae_scale.data.bands import RGB
from mae_scale.data.cache import ShardCache
from mae_scale.data.formats import MAX_PIXELS
from mae_scale.data.order import SampleOrder
from mae_scale.data.reader import ShardReader
from mae_scale.data.shards import ShardSet
from mae_scale.data.transforms import (
    TRAIN_UNIFORMS,
    eval_crop,
)
from mae_scale.errors import UserError
from mae_scale.randomness import Purpose, uniform

Pixels = TypeVar("Pixels")
_REPLACEMENT_TRIES = 10


class BatchKey(NamedTuple):
    """Request of the loader to a worker."""

    slot: int  # number of the entry of `slots` that takes the pixels
    epoch: int
    positions: npt.NDArray[np.int64]  # places in the epoch (training), or global sample ids


@dataclass
class Batch:
    """Answer of a worker. The pixels lie in the slot where there is one."""

    images: torch.Tensor | None  # uint8 [b, C, H, W]; None: they are in the slot
    slot: int
    labels: npt.NDArray[np.int64]  # [b]
    epochs: npt.NDArray[np.int64]  # [b], see `draw_epochs`
    samples: npt.NDArray[np.int64]  # [b], global ids of the samples that were really used
    damaged: dict[int, str] = field(default_factory=dict)  # sample id -> name, reason
    targets: dict[str, npt.NDArray] = field(default_factory=dict)  # further entries, by key


class _BatchDataset(torch.utils.data.Dataset):
    """Map-style dataset whose items are whole batches, keyed by `BatchKey`.

    Attributes:
        slots: uint8 [b, C, H, W] each, in memory shared with the main process; empty without
            workers. A worker writes its pixels there, so that they pass between processes without
            a copy, a file descriptor or a byte in /dev/shm.
        bands: how images are decoded.
    """

    def __init__(self, shards: ShardSet, img_size: ImageSize, cache: ShardCache | None) -> None:
        self.shards, self.img_size, self.bands = shards, img_size, RGB
        self.reader = ShardReader(shards, cache)
        self.slots: Sequence[torch.Tensor] = ()

    def __getitem__(self, key: BatchKey) -> Batch | Exception:
        # An exception is returned as a value, so that the loader raises it itself, not wrapped in
        # the worker's traceback.
        try:
            return self.batch(key)
        except Exception as error:
            return error

    def batch(self, key: BatchKey) -> Batch:
        """Make the batch that a key asks for."""
        raise NotImplementedError

    def _decode(self, sample: int, decode: Callable[[bytearray], Pixels]) -> Pixels:
        """Apply `decode` to the image of a sample.

        Raises:
            ValueError: the image is damaged; the message begins with its name.
        """
        name, data = self.reader.read(sample)
        if crc32(data) != self.shards.checksums[sample]:
            raise ValueError(f"{name} has other bytes than were indexed")
        try:
            return decode(data)
        except ValueError as error:
            raise ValueError(f"{name} {error}") from None

    def _fill(
        self,
        key: BatchKey,
        samples: npt.NDArray[np.int64],
        views: Callable[[int], Sequence[torch.Tensor]],
        repeats: int = 1,
    ) -> Batch:
        """Make the batch: `repeats` images of each sample, which follow each other.

        Args:
            key: request for the batch.
            samples: int64 [b / repeats], global ids.
            views: function that returns the images of samples[i]; it may put another id into
                `samples[i]`.
            repeats: number of images of each sample.
        """
        count = len(samples) * repeats
        images = (
            self.slots[key.slot][:count]
            if self.slots
            else empty_images(count, self.img_size, self.bands.count)
        )
        self.reader.prepare(samples)
        self.reader.announce(np.sort(samples))
        for i in np.argsort(samples):  # in the order of the shards, so that reading is sequential
            for number, pixels in enumerate(views(int(i))):
                images[i * repeats + number] = pixels
        samples = samples.repeat(repeats)
        labels = self.shards.index["label"][samples].astype(np.int64)
        draws = draw_epochs(key.epoch, repeats, len(samples))
        return Batch(None if self.slots else images, key.slot, labels, draws, samples)


def draw_epochs(epoch: int, repeats: int, images: int) -> npt.NDArray[np.int64]:
    """Return the epoch that each image takes its random draws from, int64 [images].

    The first view of a sample takes the draws of the epoch itself; the k-th view after it takes
    those of an epoch that is 2^32 k later.
    """
    return epoch + ((np.arange(images, dtype=np.int64) % repeats) << 32)


class TrainDataset(_BatchDataset):
    """Augmented crops of samples in training order; damaged ones are replaced.

    Another sample takes the place of one that cannot be decoded; (seed, epoch, sample) alone decide
    which one.

    Args:
        repeats: number of images that are made of each sample, from one decoding.
        max_pixels: a larger image counts as damaged.

    Attributes:
        can_repeat: whether `repeats` may be more than 1.
    """

    can_repeat = True

    def __init__(
        self,
        shards: ShardSet,
        img_size: ImageSize,
        order: SampleOrder,
        cache: ShardCache | None = None,
        augment: Augment | None = None,
        repeats: int = 1,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        super().__init__(shards, img_size, cache)
        self.order, self.repeats, self.max_pixels = order, repeats, max_pixels
        self._augment = augment or Augment()

    def batch(self, key: BatchKey) -> Batch:
        samples = self.order.samples(key.epoch, key.positions)
        uniforms = self._uniforms(key.epoch, samples)
        damaged: dict[int, str] = {}

        def views(i: int) -> Sequence[torch.Tensor]:
            wanted = int(samples[i])
            draws = uniforms[i]
            for attempt in range(_REPLACEMENT_TRIES):
                sample = int(samples[i])
                epochs = draw_epochs(key.epoch, self.repeats, self.repeats).tolist()
                augment = partial(
                    self._augment,
                    size=self.img_size,
                    draws=draws,
                    keys=[(self.order.seed, epoch, sample) for epoch in epochs],
                    max_pixels=self.max_pixels,
                    bands=self.bands,
                )
                try:
                    return self._decode(sample, augment)
                except ValueError as error:
                    damaged[sample] = str(error)
                samples[i] = self.order.replacement(key.epoch, wanted, attempt)
                draws = self._uniforms(key.epoch, samples[i : i + 1])[0]
            raise UserError(
                f"{self.shards.root}: sample {wanted} and {_REPLACEMENT_TRIES - 1} others drawn "
                f"in its place cannot be decoded, the last is {damaged.popitem()[1]}; "
                "check the shards with `mae-scale verify`"
            )

        batch = self._fill(key, samples, views, self.repeats)
        batch.damaged = damaged
        return batch

    def _uniforms(self, epoch: int, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Draw the random numbers of these samples, float64 [samples, repeats, TRAIN_UNIFORMS]."""
        epochs = draw_epochs(epoch, self.repeats, self.repeats)
        draws = np.arange(TRAIN_UNIFORMS)
        keys = self.order.seed, epochs[:, None], samples[:, None, None], draws
        return uniform(Purpose.AUGMENT, *keys)


class EvalDataset(_BatchDataset):
    """Centre crops. A damaged sample is an error: leaving it out would change the accuracy."""

    def __init__(
        self,
        shards: ShardSet,
        img_size: ImageSize,
        crop_ratio: float,
        cache: ShardCache | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        super().__init__(shards, img_size, cache)
        self.crop_ratio, self.max_pixels = crop_ratio, max_pixels

    def pixels(self, sample: int) -> torch.Tensor:
        """Decode and crop the image of a global sample id, uint8 [C, H, W].

        Raises:
            ValueError: the image is damaged.
            UserError, OSError: see `ShardReader.read`.
        """

        def decode(data: bytearray) -> torch.Tensor:
            image = self.bands.decode(data, self.max_pixels)
            return eval_crop(image, self.img_size, self.crop_ratio)

        return self._decode(sample, decode)

    def batch(self, key: BatchKey) -> Batch:
        def views(i: int) -> Sequence[torch.Tensor]:
            try:
                return [self.pixels(int(key.positions[i]))]
            except ValueError as error:
                raise UserError(f"{self.shards.root}: {error}") from None

        return self._fill(key, key.positions, views)


def empty_images(count: int, size: ImageSize, bands: int = 3) -> torch.Tensor:
    """Return uint8 [count, bands, H, W], uninitialised, laid out as decoder and resize write."""
    shape = (count, bands, *sides(size))
    return torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)
