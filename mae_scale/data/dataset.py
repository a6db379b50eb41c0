"""Batches of decoded, cropped pixels out of shards, read by offset.

This code runs in the data workers. It holds no state that matters: a batch follows from the
positions that are asked for, whichever worker makes it and whenever.
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from isal.isal_zlib import crc32

from mae_scale.data.augment import Augment
from mae_scale.data.cache import FetchError, ShardCache
from mae_scale.data.formats import MAX_PIXELS
from mae_scale.data.order import SampleOrder
from mae_scale.data.remote import is_remote, shown
from mae_scale.data.shards import ShardSet
from mae_scale.data.tar import BLOCK, read_header
from mae_scale.data.transforms import TRAIN_UNIFORMS, decode_image, eval_crop
from mae_scale.errors import UserError
from mae_scale.files import NotAFile, open_descriptor
from mae_scale.randomness import Purpose, uniform

_OPEN_SHARDS = 512  # most that a worker keeps open; a process may usually have 1024 files
Pixels = TypeVar("Pixels")
_READ_TRIES = 4
_READ_WAIT_S = 0.5  # before the second try; doubles
_REPLACEMENT_TRIES = 10
_FETCHES = 8  # remote shards that a worker fetches at a time


class Member(NamedTuple):
    """An image as it lies in its shard."""

    name: str
    data: bytearray


class ShardReader:
    """Reader of the images of any samples: one `preadv` of header and data on a file kept open.

    Args:
        shards: the set to read from.
        cache: stages remote shards; None for local ones.
    """

    def __init__(self, shards: ShardSet, cache: ShardCache | None = None) -> None:
        self._shards = shards
        self._cache = cache
        self._open: OrderedDict[int, int] = OrderedDict()  # shard -> descriptor, last used last

    def prepare(self, samples: npt.NDArray[np.int64]) -> None:
        """Fetch the remote shards that these samples lie in, several at a time.

        Raises:
            FetchError: a shard cannot be fetched, after several tries; the message names it.
        """
        if self._cache is None:
            return
        shards = np.unique(self._shard_of(samples)).tolist()
        missing = [shard for shard in shards if shard not in self._open]
        if not missing:
            return
        for shard in set(self._open) - set(shards):
            if os.fstat(self._open[shard]).st_nlink == 0:
                self._close(shard)  # removed from the cache, it takes room until it is closed
        with ThreadPoolExecutor(_FETCHES) as pool:
            for shard, descriptor in zip(missing, pool.map(self._open_file, missing), strict=True):
                self._keep(shard, descriptor)

    def announce(self, samples: npt.NDArray[np.int64]) -> None:
        """Tell the kernel what will be read, so that it reads many places at the same time.

        Copies in the cache have just been written and are left out. A shard that cannot be opened
        is left to `read`, which raises the error.
        """
        for sample in samples:
            shard = int(self._shard_of(sample))
            if is_remote(self._shards.files[shard]):
                continue
            offset, size = self._shards.index[sample].item()[:2]
            with suppress(OSError, UserError):
                os.posix_fadvise(
                    self._descriptor(shard), offset - BLOCK, size + BLOCK, os.POSIX_FADV_WILLNEED
                )

    def read(self, sample: int) -> Member:
        """Read the image file of a global sample id.

        Raises:
            UserError: the shard is not what was indexed.
            OSError: the shard cannot be read, after several tries; the message names it.
        """
        return self._member(sample, "offset", "size")

    def name(self, sample: int) -> str:
        """Read the name of the image of a global sample id; errors are those of `read`."""
        shard, header = int(self._shard_of(sample)), bytearray(BLOCK)
        offset = int(self._shards.index[sample]["offset"])
        os.preadv(self._descriptor(shard), [header], offset - BLOCK)
        found = read_header(header)
        if found is None:
            raise self._changed(shard, f"no member lies at offset {offset}")
        return found.name

    def read_annotation(self, sample: int) -> Member:
        """Read the annotation file of a global sample id, in shards that have them; see `read`."""
        return self._member(sample, "extra_offset", "extra_size")

    def _member(self, sample: int, offset_field: str, size_field: str) -> Member:
        shard = int(self._shard_of(sample))
        entry = self._shards.index[sample]
        offset, size = int(entry[offset_field]), int(entry[size_field])
        header, data = bytearray(BLOCK), bytearray(size)
        for attempt in range(_READ_TRIES):
            try:
                got = os.preadv(self._descriptor(shard), [header, data], offset - BLOCK)
                break
            except FetchError:
                raise
            except OSError as error:
                self._close(shard)  # a stale handle never works again
                file = shown(self._shards.files[shard])
                if isinstance(error, NotAFile):
                    raise UserError(f"{file} cannot be read: {error.strerror}") from None
                if attempt + 1 == _READ_TRIES:
                    what = f"{file} cannot be read ({_READ_TRIES} tries): {error}"
                    raise OSError(what) from error
                time.sleep(_READ_WAIT_S * 2**attempt)
        found = read_header(header) if got == BLOCK + size else None
        if found is None:
            raise self._changed(shard, f"no member lies at offset {offset}")
        if size != found.size:
            raise self._changed(shard, f"{found.name} is not of the indexed {size} bytes")
        return Member(found.name, data)

    def _shard_of(self, samples: int | npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return np.searchsorted(self._shards.starts, samples, side="right") - 1

    def _descriptor(self, shard: int) -> int:
        if shard not in self._open:
            self._keep(shard, self._open_file(shard))
        self._open.move_to_end(shard)
        descriptor = self._open[shard]
        if self._cache is not None and is_remote(self._shards.files[shard]):
            self._cache.used(descriptor)
        return descriptor

    def _open_file(self, shard: int) -> int:
        file, size = self._shards.files[shard], int(self._shards.bytes[shard])
        if self._cache is not None and is_remote(file):
            descriptor = self._cache.open(file, size, self._shards.sha256[shard] or None)
        else:
            descriptor = open_descriptor(file)
        found = os.fstat(descriptor).st_size
        if found != size:
            os.close(descriptor)
            raise self._changed(shard, f"it has {found} bytes, indexed {size}")
        return descriptor

    def _keep(self, shard: int, descriptor: int) -> None:
        self._open[shard] = descriptor
        while len(self._open) > _OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1])

    def _changed(self, shard: int, what: str) -> UserError:
        return UserError(
            f"{shown(self._shards.files[shard])} has changed since it was indexed: {what}; "
            "check it with `mae-scale verify`, or index it again"
        )

    def _close(self, shard: int) -> None:
        if shard in self._open:
            os.close(self._open.pop(shard))

    def close(self) -> None:
        """Close all files."""
        for shard in list(self._open):
            self._close(shard)


class BatchKey(NamedTuple):
    """Request of the loader to a worker."""

    slot: int  # number of the entry of `slots` that takes the pixels
    epoch: int
    positions: npt.NDArray[np.int64]  # in the epoch (training), or global sample ids (evaluation)


@dataclass
class Batch:
    """Answer of a worker. The pixels lie in the slot where there is one."""

    images: torch.Tensor | None  # uint8 [b, 3, S, S]; None: they are in the slot
    slot: int
    labels: npt.NDArray[np.int64]  # [b]
    epochs: npt.NDArray[np.int64]  # [b], see `draw_epochs`
    samples: npt.NDArray[np.int64]  # [b], global ids of what was really used
    damaged: dict[int, str] = field(default_factory=dict)  # replaced: sample id -> name, reason
    targets: dict[str, npt.NDArray] = field(default_factory=dict)  # further entries, by key


class _BatchDataset(torch.utils.data.Dataset):
    """Map-style dataset whose items are whole batches, keyed by `BatchKey`.

    Attributes:
        slots: uint8 [b, 3, S, S] each, in memory shared with the main process. A worker writes
            its pixels there, so that they cross between processes without a copy, a file
            descriptor or a byte in /dev/shm. Empty without workers.
    """

    def __init__(self, shards: ShardSet, img_size: int, cache: ShardCache | None) -> None:
        self.shards, self.img_size = shards, img_size
        self.reader = ShardReader(shards, cache)
        self.slots: Sequence[torch.Tensor] = ()

    def __getitem__(self, key: BatchKey) -> Batch | Exception:
        # An exception is returned as a value: so the loader raises it as it is, not wrapped in
        # the worker's traceback.
        try:
            return self.batch(key)
        except Exception as error:
            return error

    def batch(self, key: BatchKey) -> Batch:
        raise NotImplementedError

    def _decode(self, sample: int, decode: Callable[[bytearray], Pixels]) -> Pixels:
        """Apply `decode` to the image of a sample.

        Raises:
            ValueError: it is damaged; the message begins with its name.
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
            views: gives the images of samples[i], and may put another id into `samples[i]`.
        """
        count = len(samples) * repeats
        images = self.slots[key.slot][:count] if self.slots else empty_images(count, self.img_size)
        self.reader.prepare(samples)
        self.reader.announce(np.sort(samples))
        for i in np.argsort(samples):  # in the order of the shards
            for number, pixels in enumerate(views(int(i))):
                images[i * repeats + number] = pixels
        samples = samples.repeat(repeats)
        labels = self.shards.index["label"][samples].astype(np.int64)
        draws = draw_epochs(key.epoch, repeats, len(samples))
        return Batch(None if self.slots else images, key.slot, labels, draws, samples)


def draw_epochs(epoch: int, repeats: int, images: int) -> npt.NDArray[np.int64]:
    """Return the epoch from which the random draws of each image follow, int64 [images].

    The first view of a sample has the epoch itself; the k-th one after it has the draws of an epoch
    that is 2^32 k later.
    """
    return epoch + ((np.arange(images, dtype=np.int64) % repeats) << 32)


class TrainDataset(_BatchDataset):
    """Augmented crops of samples in training order; damaged ones are replaced.

    Another sample takes the place of one that cannot be decoded; which one follows from
    (seed, epoch, sample) alone.

    Args:
        repeats: images that are made of each sample, from one decoding.
        max_pixels: a larger image counts as damaged.

    Attributes:
        can_repeat: whether `repeats` may be more than 1.
    """

    can_repeat = True

    def __init__(
        self,
        shards: ShardSet,
        img_size: int,
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
        img_size: int,
        crop_ratio: float,
        cache: ShardCache | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        super().__init__(shards, img_size, cache)
        self.crop_ratio, self.max_pixels = crop_ratio, max_pixels

    def pixels(self, sample: int) -> torch.Tensor:
        """Decode and crop the image of a global sample id, uint8 [3, S, S].

        Raises:
            ValueError: it is damaged.
            UserError, OSError: as `ShardReader.read`.
        """

        def decode(data: bytearray) -> torch.Tensor:
            return eval_crop(decode_image(data, self.max_pixels), self.img_size, self.crop_ratio)

        return self._decode(sample, decode)

    def batch(self, key: BatchKey) -> Batch:
        def views(i: int) -> Sequence[torch.Tensor]:
            try:
                return [self.pixels(int(key.positions[i]))]
            except ValueError as error:
                raise UserError(f"{self.shards.root}: {error}") from None

        return self._fill(key, key.positions, views)


def empty_images(count: int, size: int) -> torch.Tensor:
    """Return uint8 [count, 3, size, size], uninitialised, laid out as decoder and resize write."""
    layout = torch.channels_last
    return torch.empty((count, 3, size, size), dtype=torch.uint8, memory_format=layout)
