"""Evaluation of classifiers, also on the robustness sets of the paper's Appendix C.

Detectors and segmenters are passed on to `evaluate_dense`.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mae_scale.data.shards import ShardSet, open_shards
from mae_scale.errors import UserError
from mae_scale.files import write_atomically
from mae_scale.inference import evaluate_dense
from mae_scale.inference.evaluate_dense import header
from mae_scale.inference.model import chosen_model
from mae_scale.launch.distributed import on_rank0
from mae_scale.launch.watchdog import Watchdog
from mae_scale.tasks.classification import matched
from mae_scale.tasks.trained import TrainedRun, best_checkpoint, is_ours
from mae_scale.train.validation import Scores, evaluate
from mae_scale.world import World

log = logging.getLogger("mae_scale")

# Top-1 errors of AlexNet on ImageNet-C, from 0 to 1, means over the five severities, from the
# authors' code (github.com/hendrycks/robustness). The corruption error of a corruption is a model's
# error divided by AlexNet's.
ALEXNET_ERRORS = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
SEVERITIES = (1, 2, 3, 4, 5)


def run(options: argparse.Namespace, world: World, watchdog: Watchdog) -> None:
    """Evaluate on all sets; rank 0 prints and writes.

    Args:
        options: arguments of `mae-scale evaluate`.
        world: this process among the others.
        watchdog: watchdog of the process group.

    Raises:
        UserError: weights, data or options do not fit each other.
    """
    named = _named(options.data)
    if is_ours(options.weights):
        folder = on_rank0(lambda: best_checkpoint(options.weights))
        if TrainedRun.read(folder).task.name in evaluate_dense.TASKS:
            evaluate_dense.run(options, named, world, watchdog.doing)
            return
    if options.multi_scale:
        raise UserError(f"--multi_scale: {options.weights} is no run of segment")
    sets = {name: open_shards(spec, options.cache_dir) for name, spec in named}
    corrupted = _corrupted(options)
    every = {**sets, **corrupted}
    if not every:
        raise UserError("nothing to evaluate on: give NAME=SHARDS or --imagenet_c FOLDER")
    found = chosen_model(options, "classifier", fallback=next(iter(every.values())).classes)
    outputs = {
        name: outputs_of(shards, found.classes, options.classes_of_data)
        for name, shards in every.items()
    }
    for name, (columns, label_of) in outputs.items():
        if len(label_of) < len(found.classes):
            log.info(
                "%s has %d of the %d classes; %s",
                *(name, len(label_of), len(found.classes)),
                "only their outputs count (--classes-of-data)"
                if len(columns) < len(found.classes)
                else "all outputs count; --classes-of-data leaves out those of the others",
            )
    found.put(world.device, options.precision)

    def scores_on(name: str, shards: ShardSet) -> Scores:
        columns, label_of = outputs[name]
        scores = evaluate(
            lambda images: found.model(images)[:, columns.to(world.device)],
            found.loader(shards, options, world),
            classes=len(columns),
            device=world.device,
            doing=watchdog.doing,
            what=f"evaluating {name}",
            label_of=label_of,
            confusion=options.tables is not None,
        )
        assert scores is not None  # it is None only where something stops it, and nothing can here
        return scores

    results = header(options, found.run)
    for name, shards in sets.items():
        scores = scores_on(name, shards)
        names = [found.classes[i] for i in outputs[name][0].tolist()]
        per_class = dict(zip(names, scores.per_class(), strict=True))
        results["sets"][name] = {"shards": shards.root, **scores.row(), "per_class": per_class}
        if world.rank == 0 and options.tables is not None:
            write_tables(options.tables, name, names, scores)
    if corrupted:
        top1 = {name: scores_on(name, shards).row()["top1"] for name, shards in corrupted.items()}
        results["imagenet_c"] = corruption_errors(top1)
    if world.rank == 0:
        if options.out is not None:
            write_atomically(options.out, json.dumps(results, indent=1) + "\n")
        print(table(results))


def _named(specs: Sequence[str]) -> list[tuple[str, str]]:
    named = []
    for spec in specs:
        name, equals, folder = spec.partition("=")
        if equals and not folder:
            raise UserError(f"no shard folder stands behind '{spec}'; is a variable unset?")
        named.append((name, folder) if equals else (spec, spec))
    names = [name for name, _ in named]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two data sets have the name {name}")
    return named


def _corrupted(options: argparse.Namespace) -> dict[str, ShardSet]:
    """Open the 75 sets of ImageNet-C, by <corruption>/<severity>."""
    if options.imagenet_c is None:
        return {}
    return {
        f"{corruption}/{severity}": open_shards(
            f"{options.imagenet_c}/{corruption}/{severity}", options.cache_dir
        )
        for corruption in ALEXNET_ERRORS
        for severity in SEVERITIES
    }


def outputs_of(
    shards: ShardSet, classes: list[str], of_data: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the outputs of a classifier that count on a data set, and the output for each label.

    Classes are matched by name (wnid). If the classes of the set are named by the numbers 0 to
    n - 1, as in ImageNet-V2, they are the outputs of these numbers.

    Args:
        shards: data set.
        classes: names of the classifier's n outputs, in order.
        of_data: whether only the outputs of the set's own classes count. That is the protocol of
            ImageNet-A and -R, which have 200 of the 1000 classes.

    Returns:
        columns: int64 [k], numbers of the outputs that count, in rising order.
        label_of: int64 [labels of the set], place of each label's output in `columns`.

    Raises:
        UserError: the set has classes that the classifier does not have.
    """
    numbers = list(map(str, range(len(classes))))
    if sorted(shards.classes) == sorted(numbers) != sorted(classes):
        classes = numbers
    label_of = matched(shards, classes, "the classifier's")
    if label_of is None:
        label_of = torch.arange(len(classes))
    columns = label_of.sort().values if of_data else torch.arange(len(classes))
    return columns, torch.searchsorted(columns, label_of)


def write_tables(folder: Path, name: str, classes: list[str], scores: Scores) -> None:
    """Write the accuracy of each class of a data set and its confusion matrix, as CSV.

    Args:
        folder: folder for `<name>-classes.csv` and `<name>-confusion.csv`.
        name: name of the data set; in the names of the files `_` replaces special characters.
        classes: names of the classes, in order.
        scores: scores with the counts of the confusion matrix.
    """
    assert scores.confusion is not None
    folder.mkdir(parents=True, exist_ok=True)
    base = re.sub(r"[^\w.-]+", "_", name).strip("_")
    counts = scores.confusion.tolist()
    rows: list[list[Any]] = [["class", "images", "top1", "most_often_taken_for", "times"]]
    for number, (label, top1) in enumerate(zip(classes, scores.per_class(), strict=True)):
        wrong = [(times, i) for i, times in enumerate(counts[number]) if i != number and times]
        times, other = max(wrong, key=lambda pair: (pair[0], -pair[1]), default=(0, None))
        shown = "" if top1 is None else f"{top1:.2f}"
        named = "" if other is None else classes[other]
        rows.append([label, int(scores.images[number]), shown, named, times])
    _write_csv(folder / f"{base}-classes.csv", rows)
    matrix = [[label, *row] for label, row in zip(classes, counts, strict=True)]
    _write_csv(folder / f"{base}-confusion.csv", [["class", *classes], *matrix])


def _write_csv(path: Path, rows: list[list[Any]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_atomically(path, text.getvalue())


def corruption_errors(top1: dict[str, float]) -> dict[str, Any]:
    """Compute the corruption errors and their mean, in percent.

    The error of a corruption is the sum of the model's top-1 errors over the severities, divided by
    AlexNet's sum (Hendrycks & Dietterich, arXiv 1903.12261).

    Args:
        top1: top-1 accuracy in percent, by <corruption>/<severity>.

    Returns:
        "top1" as it was given, "ce" with the error of each corruption, and their mean "mce".
    """
    errors = {}
    for corruption, alexnet in ALEXNET_ERRORS.items():
        own = [100 - top1[f"{corruption}/{severity}"] for severity in SEVERITIES]
        errors[corruption] = sum(own) / len(own) / alexnet
    return {"top1": top1, "ce": errors, "mce": sum(errors.values()) / len(errors)}


def table(results: dict[str, Any]) -> str:
    """Format the scores, with one line for each set."""
    lines = [f"{'set':<24}{'images':>9}{'top-1':>9}{'top-5':>9}{'loss':>10}"]
    for name, row in results["sets"].items():
        lines.append(
            f"{name:<24}{row['images']:>9}{row['top1']:>9.2f}{row['top5']:>9.2f}{row['loss']:>10.4f}"
        )
    if "imagenet_c" in results:
        lines.append(f"ImageNet-C: mean corruption error {results['imagenet_c']['mce']:.1f} %")
    return "\n".join(lines)
