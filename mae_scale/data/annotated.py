"""Batches of images with annotations, for training and for evaluation.

Everything random follows from (seed, epoch, sample), as for classification. A batch is a dict of
tensors without lists, so that it moves to a device as it is:

- "image": uint8 [b, 3, S, S]; "size": int64 [b, 2], height and width of the part that is image;
  what lies outside is padding (`normalize_padded`). "sample", "epoch", "label": see `TrainLoader`.
- detection: "objects": int64 [b], the number of objects of each image. The objects of the batch
  follow each other, image after image: "boxes": float32 [n, 4], x0, y0, x1, y1 in pixels;
  "classes": int64 [n], from 0 in the order of the category ids; "masks": uint8
  [n, S, ceil(S / 8)], one bit per pixel (`unpack_masks`).
- segmentation: "segmentation": uint8 [b, S, S], classes from 0, `IGNORE` where there is none.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from isal.isal_zlib import crc32

from mae_scale.config.sizes import ImageSize, sides
from mae_scale.data.annotated_transforms import (
    Targets,
    Transform,
    decode_pair,
    evaluation_input,
)
from mae_scale.data.annotations import IGNORE
from mae_scale.data.cache import ShardCache
from mae_scale.data.dataset import Batch, BatchKey, EvalDataset, TrainDataset, draw_epochs
from mae_scale.data.loader import EvalLoader, TrainLoader
from mae_scale.data.order import Int64Array, SampleOrder
from mae_scale.data.shards import ShardSet
from mae_scale.data.transforms import decode_image
from mae_scale.errors import UserError

_REPLACEMENTS = 10


class UsableOrder(SampleOrder):
    """The order of the samples that have an object; the others have no place in an epoch."""

    def __init__(self, shards: ShardSet, seed: int, lanes: int, window: int) -> None:
        self._usable = np.flatnonzero(shards.index["objects"] > 0).astype(np.int64)
        of_shard = np.diff(np.searchsorted(self._usable, shards.starts))
        super().__init__(of_shard.astype(np.int64), seed, lanes, window)

    def samples(self, epoch: int, positions: npt.ArrayLike) -> Int64Array:
        """Return global ids as `SampleOrder.samples` does, only of samples with an object."""
        return self._usable[super().samples(epoch, positions)]

    def replacement(self, epoch: int, sample: int, attempt: int) -> int:
        """Draw a sample id as `SampleOrder.replacement` does, only among samples with an object."""
        return int(self._usable[super().replacement(epoch, sample, attempt)])


class AnnotatedTrainDataset(TrainDataset):
    """Samples with targets in training order; damaged ones are replaced, as for classification."""

    can_repeat = False

    def __init__(
        self,
        shards: ShardSet,
        img_size: ImageSize,
        order: SampleOrder,
        cache: ShardCache | None,
        transform: Transform,
    ) -> None:
        super().__init__(shards, img_size, order, cache)
        self._transform = transform

    def batch(self, key: BatchKey) -> Batch:
        """Read the batch at some positions of an epoch."""
        samples = self.order.samples(key.epoch, key.positions)
        damaged: dict[int, str] = {}
        targets: dict[int, Targets] = {}

        def pixels(i: int) -> torch.Tensor:
            wanted = int(samples[i])
            for attempt in range(_REPLACEMENTS):
                sample = int(samples[i])
                keys = (self.order.seed, key.epoch, sample)
                try:
                    image, annotation = read_pair(self, sample)
                    found, targets[i] = self._transform(
                        image, annotation, sides(self.img_size)[0], keys, self.max_pixels
                    )
                    _check_classes(self.shards, targets[i])
                    return found
                except ValueError as error:
                    damaged[sample] = f"{self.reader.read(sample).name} {error}"
                samples[i] = self.order.replacement(key.epoch, wanted, attempt)
            raise UserError(
                f"{self.shards.root}: sample {wanted} and {_REPLACEMENTS - 1} others drawn in its "
                f"place cannot be used, the last is {damaged.popitem()[1]}; check the shards with "
                "`mae-scale verify`"
            )

        batch = self._fill(key, samples, lambda i: [pixels(i)])
        batch.damaged = damaged
        batch.targets = joined([targets[i] for i in range(len(samples))])
        return batch


def read_pair(dataset: TrainDataset | EvalDataset, sample: int) -> tuple[bytearray, bytearray]:
    """Read the image file and the annotation file of a sample.

    Raises:
        ValueError: the bytes of one of them differ from those that were indexed.
    """
    image, annotation = dataset.reader.read(sample), dataset.reader.read_annotation(sample)
    if crc32(image.data) != dataset.shards.checksums[sample]:
        raise ValueError("has other bytes than were indexed")
    if crc32(annotation.data) != dataset.shards.index["extra_checksum"][sample]:
        raise ValueError(f"has an annotation {annotation.name} of other bytes than were indexed")
    return image.data, annotation.data


def _check_classes(shards: ShardSet, targets: Targets) -> None:
    """Raise a ValueError where a pixel has a class that the shards do not list."""
    labels = targets.get("segmentation")
    if labels is not None:
        largest = int(labels[labels != IGNORE].max(initial=0))
        if largest >= len(shards.classes):
            raise ValueError(
                f"has a mask with the value {largest + 1}; the shards list {len(shards.classes)} "
                "classes"
            )


def joined(targets: list[Targets]) -> Targets:
    """Join the targets of several images into those of a batch."""
    return {key: np.concatenate([each[key] for each in targets]) for key in targets[0]}


class AnnotatedTrainLoader(TrainLoader):
    """`TrainLoader` of shards with annotations; its `augment` is a `Transform`.

    An epoch leaves out images without an object.
    """

    def _order(self, shards: ShardSet, seed: int, lanes: int, window: int) -> SampleOrder:
        return UsableOrder(shards, seed, lanes, window)

    def _make_dataset(
        self,
        shards: ShardSet,
        img_size: ImageSize,
        order: SampleOrder,
        cache: ShardCache | None,
        augment: Any,
    ) -> TrainDataset:
        return AnnotatedTrainDataset(shards, img_size, order, cache, augment)


class _DetectionEvalDataset(EvalDataset):
    """Whole images, resized by the long side and padded; "original" is their size in the file."""

    def batch(self, key: BatchKey) -> Batch:
        targets: dict[int, Targets] = {}

        def pixels(i: int) -> torch.Tensor:
            image = _decoded(self, int(key.positions[i]))
            height, width = image.shape[1:]
            square, size = evaluation_input(image, sides(self.img_size)[0])
            targets[i] = {"size": np.array([size]), "original": np.array([[height, width]])}
            return square

        batch = self._fill(key, key.positions, lambda i: [pixels(i)])
        batch.targets = joined([targets[i] for i in range(len(key.positions))])
        return batch


class _SegmentationEvalDataset(EvalDataset):
    """Single images in the size of the file, with the class of each pixel."""

    def batch(self, key: BatchKey) -> Batch:
        (sample,) = (int(position) for position in key.positions)
        self.reader.prepare(key.positions)
        try:
            image, labels = decode_pair(*read_pair(self, sample), self.max_pixels)
            _check_classes(self.shards, {"segmentation": labels})
        except ValueError as error:
            name = self.reader.read(sample).name
            raise UserError(f"{self.shards.root}: {name} {error}") from None
        targets = {"image": image[None].numpy(), "segmentation": labels[None]}
        label = self.shards.index["label"][key.positions].astype(np.int64)
        epochs = draw_epochs(key.epoch, 1, len(label))
        return Batch(None, key.slot, label, epochs, key.positions, targets=targets)


def _decoded(dataset: EvalDataset, sample: int) -> torch.Tensor:
    try:
        return decode_image(read_pair(dataset, sample)[0], dataset.max_pixels)
    except ValueError as error:
        name = dataset.reader.read(sample).name
        raise UserError(f"{dataset.shards.root}: {name} {error}") from None


class DetectionEvalLoader(EvalLoader):
    """One pass over all images: "image", "size" as in training, and "original" int64 [b, 2]."""

    def _make_dataset(
        self, shards: ShardSet, img_size: ImageSize, crop_ratio: float, cache: ShardCache | None
    ) -> EvalDataset:
        return _DetectionEvalDataset(shards, img_size, crop_ratio, cache)


class SegmentationEvalLoader(EvalLoader):
    """One pass over single images in their own sizes: "image" uint8 [1, 3, H, W], "segmentation".

    "segmentation" is uint8 [1, H, W], classes from 0, or `IGNORE`.
    """

    def _make_dataset(
        self, shards: ShardSet, img_size: ImageSize, crop_ratio: float, cache: ShardCache | None
    ) -> EvalDataset:
        return _SegmentationEvalDataset(shards, img_size, crop_ratio, cache)
