"""Shards as an ordinary PyTorch dataset, for use outside of this program."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mae_scale.data.bands import RGB, Bands
from mae_scale.data.formats import MAX_PIXELS
from mae_scale.data.reader import ShardReader, shard_cache
from mae_scale.data.shards import open_shards


class ShardDataset(torch.utils.data.Dataset):
    """A map-style dataset of the images of a shard folder and their labels, by global sample id.

    Each image is read by its offset, so that PyTorch's samplers, `Subset` and `DataLoader` (with
    any start method) work as on a folder of images.

    Args:
        spec: folder with a manifest, or a remote prefix, see `open_shards`.
        transform: function that is applied to the decoded image, uint8 [3, H, W], such as one of
            torchvision.transforms.v2. None: the image is returned unchanged.
        cache_dir: folder into which remote shards are staged.
        max_pixels: a larger image is refused before it is decoded.
        bands: how images are decoded; `Bands(5, mean, std)` gives uint8 [5, H, W].

    Attributes:
        shards: `ShardSet` that the images come from.
        classes: names of the classes, in the order of the labels.

    Raises:
        UserError: `spec` does not exist, or is no finished shard folder.
    """

    def __init__(
        self,
        spec: str | Path,
        transform: Callable[[torch.Tensor], Any] | None = None,
        cache_dir: str | Path | None = None,
        max_pixels: int = MAX_PIXELS,
        bands: Bands = RGB,
    ) -> None:
        self.shards = open_shards(spec, cache_dir)
        self.classes = self.shards.classes
        self._transform, self._max_pixels, self._bands = transform, max_pixels, bands
        self._cache = shard_cache(self.shards, cache_dir, None)
        self._reader: tuple[int, ShardReader] | None = None  # id of the process, its reader

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, sample: int) -> tuple[Any, int]:
        """Return the image, transformed, and its label (-1: no label).

        Raises:
            IndexError: there is no such sample.
            ValueError: the image is damaged.
            OSError: the shard cannot be read.
        """
        if not -len(self) <= sample < len(self):
            raise IndexError(f"sample {sample} of {len(self)}")
        sample %= len(self)
        if self._reader is None or self._reader[0] != os.getpid():
            self._reader = os.getpid(), ShardReader(self.shards, self._cache)
        name, data = self._reader[1].read(sample)
        try:
            image = self._bands.decode(data, self._max_pixels)
        except ValueError as error:
            raise ValueError(f"{self.shards.root}: {name} {error}") from None
        label = int(self.shards.index["label"][sample])
        return image if self._transform is None else self._transform(image), label

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None}
