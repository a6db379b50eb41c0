"""The plan of the shards: the shard and the place of each image.

The plan follows from the list of images, the seed and the options alone. So any process can write
any shard at any time, and the shards are the same.
"""

from __future__ import annotations

import re
import tarfile
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from mae_scale.data.formats import MAX_PIXELS
from mae_scale.errors import UserError
from mae_scale.randomness import Purpose, permutation
from mae_scale.sharding.annotated import AnnotatedSource
from mae_scale.sharding.images import shrink
from mae_scale.sharding.sources import Source

# Keys that the record leaves out at their defaults. Folders of older versions may have the second.
OPTIONAL = ("max_pixels", "baseline")


@dataclass(frozen=True)
class Options:
    """Options that, with the images, decide the bytes of the shards."""

    split: str
    seed: int = 0
    samples_per_shard: int | None = None
    shard_size: int = 256_000_000  # bytes, if samples_per_shard is None
    resize_short: int | None = None  # pixels of the short side; None: not resized
    quality: int = 90  # quality of resized JPEGs
    max_pixels: int = MAX_PIXELS  # a larger image counts as damaged


class Plan:
    """The shard and the place of each image."""

    def __init__(self, source: Source, options: Options) -> None:
        self.source = source
        self.options = options
        n = len(source)
        self.order = permutation(n, Purpose.WRITE_ORDER, options.seed)
        self.entry_sizes = 512 + _padded(source.sizes * self._shrink_ratio()) + 1024
        if isinstance(source, AnnotatedSource):
            if options.resize_short:
                raise UserError(
                    f"resizing would move the pixels that the annotations of {source.root} refer "
                    "to; leave out the resizing"
                )
            self.entry_sizes += _padded(source.annotation_sizes) - 512
        if options.samples_per_shard:
            count = -(-n // options.samples_per_shard)
            bounds = np.minimum(np.arange(count + 1) * options.samples_per_shard, n)
        else:
            count = min(n, max(1, round(int(self.entry_sizes.sum()) / options.shard_size)))
            bounds = np.arange(count + 1) * n // count
        self.bounds: npt.NDArray[np.int64] = bounds
        self.keys = source.keys if isinstance(source, AnnotatedSource) else _keys(source)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def file(self, shard: int) -> str:
        """Return the name of a shard's tar."""
        return f"{self.options.split}-{shard:06d}.tar"

    def images(self, shard: int) -> npt.NDArray[np.int64]:
        """Return the places in the source of a shard's images, int64, in the order of the shard."""
        return self.order[self.bounds[shard] : self.bounds[shard + 1]]

    def bytes(self, shard: int) -> int:
        """Return the size of the tar in bytes; it is an estimate if images are resized."""
        size = int(self.entry_sizes[self.images(shard)].sum()) + 2 * tarfile.BLOCKSIZE
        return -(-size // tarfile.RECORDSIZE) * tarfile.RECORDSIZE

    def _shrink_ratio(self) -> float:
        """Estimate the ratio of bytes after resizing to bytes before, from 200 images."""
        if not self.options.resize_short:
            return 1.0
        before, after = 0, 0
        for i in self.order[:200]:
            with suppress(Exception):  # damaged images are reported when their shard is written
                data = self.source.read(int(i))
                after += len(shrink(data, self.options.resize_short, self.options.quality))
                before += len(data)
        return after / before if before else 1.0

    @cached_property
    def record(self) -> dict[str, Any]:
        """Return the facts that two runs must share to write into one folder."""
        options = self.options
        by_size = options.samples_per_shard is None
        return {
            "split": options.split,
            "images": len(self.source),
            "classes": len(self.source.classes),
            "seed": options.seed,
            "samples_per_shard": options.samples_per_shard,
            "shard_size": options.shard_size if by_size else None,
            "resize_short": options.resize_short,
            "quality": options.quality if options.resize_short else None,
            "source_sha256": self.source.fingerprint(),
            # Older folders have no such key, so it is written only if its value is not the default.
            **({"max_pixels": options.max_pixels} if options.max_pixels != MAX_PIXELS else {}),
        }


def _padded(size: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    return -(-size.astype(np.int64) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _keys(source: Source) -> list[str]:
    """Make WebDataset keys: file names if these are unique and safe, otherwise numbers.

    A dot would end the key, and ustar has room for 100 bytes.
    """
    stems = [source.file_name(i).rpartition(".")[0] for i in range(len(source))]
    keys = [re.sub(r"[^A-Za-z0-9_-]", "_", stem) for stem in stems]
    if len(set(keys)) == len(keys) and max(map(len, keys)) <= 90:
        return keys
    return [f"{i:08d}_{key[:80]}" for i, key in enumerate(keys)]
