"""Evaluating an encoder by nearest neighbours, as `mae-scale knn` asks for it."""

from __future__ import annotations

import argparse
import json

import torch

from mae_scale.commands.describing import encoder_of, labels_of, loader_of
from mae_scale.data.shards import ShardSet, open_shards
from mae_scale.errors import UserError
from mae_scale.files import write_atomically
from mae_scale.launch.watchdog import Watchdog
from mae_scale.tasks.classification import classes_of, matched
from mae_scale.train.features import features_of
from mae_scale.train.knn import knn_scores
from mae_scale.world import World


def run(options: argparse.Namespace, world: World, watchdog: Watchdog) -> None:
    """Evaluate; rank 0 prints and writes.

    Raises:
        UserError: weights, data or options that do not fit each other.
    """
    if options.neighbours < 1:
        raise UserError(f"--neighbours {options.neighbours} must be at least 1")
    if not 0.001 <= options.temperature < float("inf"):
        raise UserError(f"--temperature {options.temperature} must be at least 0.001")
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
        loader = loader_of(shards, encoder, options, world)
        return features_of(encoder.features, loader, world.device, doing=watchdog.doing, what=what)

    bank = features(train, "computing the features of the images that vote")
    queries = None if options.val is None else features(val, "computing features")
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
