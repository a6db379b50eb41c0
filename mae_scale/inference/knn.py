"""Evaluating an encoder by nearest neighbours, for `mae-scale knn`."""

from __future__ import annotations

import argparse
import json
from contextlib import closing
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from mae_scale.data.dataset import EvalDataset
from mae_scale.data.reader import shard_cache
from mae_scale.data.shards import ShardSet, open_shards
from mae_scale.errors import UserError
from mae_scale.files import write_atomically
from mae_scale.inference.features import encoder_of
from mae_scale.inference.images import shown, write_png
from mae_scale.inference.model import TrainedModel
from mae_scale.inference.pictures import rows_of_images
from mae_scale.launch.watchdog import Watchdog
from mae_scale.tasks.classification import classes_of, matched
from mae_scale.train.features import features_of
from mae_scale.train.knn import knn_scores
from mae_scale.world import World

_DRAWN, _SHOWN = 8, 6  # number of images in a picture, and of neighbours of each
_RIGHT, _WRONG = (46, 125, 50), (198, 40, 40)  # colours of neighbours of the same or another class


def run(options: argparse.Namespace, world: World, watchdog: Watchdog) -> None:
    """Evaluate the encoder; rank 0 prints and writes.

    Args:
        options: arguments of `mae-scale knn`.
        world: this process among the others.
        watchdog: watchdog of the process group.

    Raises:
        UserError: weights, data or options do not fit each other.
    """
    train = open_shards(options.train, options.cache_dir)
    val = train if options.val is None else open_shards(options.val, options.cache_dir)
    classes = classes_of(train)
    labels, label_of = labels_of(val), matched(val, classes)
    if label_of is not None:
        labels = label_of[labels]
    if len(train) < 2:
        raise UserError(f"{train.root} has one image, which has no neighbours")
    encoder = encoder_of(options, world)

    def features(shards: ShardSet, what: str) -> torch.Tensor:
        loader = encoder.loader(shards, options, world)
        return features_of(encoder.features, loader, world.device, doing=watchdog.doing, what=what)

    bank = features(train, "computing the features of the images that vote")
    queries = None if options.val is None else features(val, "computing features")
    if world.rank == 0 and options.picture is not None:
        watchdog.doing("drawing neighbours")
        _draw(options, encoder, train, val, bank, queries, labels)
    watchdog.doing("comparing features")
    scores = knn_scores(
        bank,
        labels_of(train),
        queries,
        labels,
        len(classes),
        neighbours=options.neighbours,
        temperature=options.temperature,
    )
    if world.rank > 0:
        return
    facts = {
        "weights": str(options.weights),
        "train": train.root,
        "val": val.root,
        "images": len(val),
        "neighbours": options.neighbours,
        "temperature": options.temperature,
        **scores,
    }
    if options.out is not None:
        write_atomically(options.out, json.dumps(facts, indent=1) + "\n")
    print(f"{'images':>9}{'top-1':>9}{'top-5':>9}")
    print(f"{len(val):>9}{scores['knn_top1']:>9.2f}{scores['knn_top5']:>9.2f}")


def _draw(
    options: argparse.Namespace,
    encoder: TrainedModel,
    train: ShardSet,
    val: ShardSet,
    bank: torch.Tensor,
    queries: torch.Tensor | None,
    labels: torch.Tensor,
) -> None:
    """Draw some images, spread over the set, and the nearest neighbours of each.

    Args:
        options: arguments of `mae-scale knn`.
        encoder: encoder that has computed the features.
        train: shards of the images that vote.
        val: shards of the images that are drawn.
        bank: features of the images that vote, [N, D].
        queries: features of the images that are drawn, [M, D]; None: those of the bank.
        labels: classes of the images that are drawn, int64 [M].
    """
    asked, near = bank if queries is None else queries, labels_of(train)
    number = min(_DRAWN, len(asked))
    chosen = [i * len(asked) // number for i in range(number)]
    cosines = F.normalize(asked[chosen], dim=1) @ F.normalize(bank, dim=1).T
    if queries is None:
        cosines[range(number), chosen] = -torch.inf
    best = cosines.topk(min(_SHOWN, len(bank) - (queries is None)), dim=1)
    rows = []
    with (
        closing(_Images(options, encoder, val)) as own,
        closing(_Images(options, encoder, train)) as others,
    ):
        for i, values, found in zip(
            chosen, best.values.tolist(), best.indices.tolist(), strict=True
        ):
            right = int(labels[i])
            row: list[Any] = [(own(i), train.classes[right], None)]
            for cosine, j in zip(values, found, strict=True):
                label = int(near[j])
                color = _RIGHT if label == right else _WRONG
                row.append((others(j), f"{cosine:.2f} {train.classes[label]}", color))
            rows.append(row)
    header = ["image", "nearest: cosine and class; green: the same class, red: another one"]
    write_png(options.picture, rows_of_images(rows, header))


def labels_of(shards: ShardSet) -> torch.Tensor:
    """Return the label of each sample, int64 [N]."""
    return torch.from_numpy(shards.index["label"].astype(np.int64))


class _Images:
    """Reads the images of a data set as the encoder sees them, uint8 [H, W, 3]."""

    def __init__(
        self, options: argparse.Namespace, encoder: TrainedModel, shards: ShardSet
    ) -> None:
        cache = shard_cache(shards, options.cache_dir, None)
        self._dataset = EvalDataset(shards, encoder.size, encoder.crop_ratio, cache)
        self._dataset.bands = encoder.bands

    def __call__(self, sample: int) -> npt.NDArray[np.uint8]:
        return shown(self._dataset.pixels(sample))

    def close(self) -> None:
        self._dataset.reader.close()
