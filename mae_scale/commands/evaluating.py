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

from mae_scale.commands import evaluate_dense
from mae_scale.config.batch import resolve_precision
from mae_scale.data.loader import EvalLoader
from mae_scale.data.shards import ShardSet, open_shards
from mae_scale.errors import UserError
from mae_scale.files import write_atomically
from mae_scale.launch.distributed import on_rank0
from mae_scale.launch.watchdog import Watchdog
from mae_scale.models.classifier import keep_statistics_in_fp32
from mae_scale.sharding.labels import normal
from mae_scale.sharding.lists import read_classes
from mae_scale.tasks.classification import classes_of
from mae_scale.tasks.classifiers import read_classifier
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
    for name, least in {"batch_size": 1, "workers": 0, "max_pixels": 1}.items():
        if getattr(options, name) is not None and getattr(options, name) < least:
            raise UserError(f"--{name} {getattr(options, name)} must be at least {least}")
    if options.crop_ratio is not None and not 0 < options.crop_ratio <= 1:
        raise UserError(f"--crop_ratio {options.crop_ratio} must lie in 0 to 1, not 0")
    if is_ours(options.weights):
        trained = TrainedRun.read(on_rank0(lambda: best_checkpoint(options.weights)))
        if trained.task.name in evaluate_dense.TASKS:
            evaluate_dense.run(trained, options, _named(options.data), world, watchdog.doing)
            return
    if options.multi_scale:
        raise UserError(f"--multi_scale: {options.weights} is no run of segment")
    sets = {name: open_shards(spec, options.cache_dir) for name, spec in _named(options.data)}
    corrupted = _corrupted(options)
    if not sets and not corrupted:
        raise UserError("nothing to evaluate on: give NAME=SHARDS or --imagenet_c FOLDER")
    loaded = read_classifier(
        options.weights,
        name=options.model,
        classes=None if options.classes is None else read_classes(options.classes),
        fallback=next(iter([*sets.values(), *corrupted.values()])).classes,
        img_size=options.img_size,
        ema=options.ema,
    )
    outputs = {name: outputs_of(shards, loaded.classes) for name, shards in sets.items()}
    outputs |= {name: outputs_of(shards, loaded.classes) for name, shards in corrupted.items()}
    model = loaded.model.eval().to(world.device)
    if resolve_precision(options.precision, world.device) == "bf16":
        model = model.bfloat16()
        keep_statistics_in_fp32(model)

    def scores_on(name: str, shards: ShardSet) -> Scores:
        loader = EvalLoader(
            shards,
            img_size=model.patch_embed.img_size,
            batch_size=options.batch_size,
            rank=world.rank,
            world_size=world.size,
            workers=options.workers,
            crop_ratio=loaded.crop_ratio if options.crop_ratio is None else options.crop_ratio,
            pin_memory=world.device.type == "cuda",
            cache_dir=options.cache_dir,
            max_pixels=options.max_pixels or loaded.max_pixels,
            bands=loaded.bands,
        )
        columns, label_of = outputs[name]
        found = evaluate(
            lambda images: model(images)[:, columns.to(world.device)],
            loader,
            classes=len(columns),
            device=world.device,
            doing=watchdog.doing,
            what=f"evaluating {name}",
            label_of=label_of,
            confusion=options.tables is not None,
        )
        assert found is not None  # it is None only where something stops it, and nothing can here
        return found

    results: dict[str, Any] = {"weights": str(options.weights), "step": loaded.step, "sets": {}}
    for name, shards in sets.items():
        scores = scores_on(name, shards)
        names = [loaded.classes[i] for i in outputs[name][0].tolist()]
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


def outputs_of(shards: ShardSet, classes: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the outputs of a classifier that count on a data set, and the output for each label.

    Classes are matched by name (wnid). On ImageNet-A and -R, which have 200 of the 1000 classes,
    only the outputs of these 200 count, as in their authors' protocol. If the classes of the set
    are named by the numbers 0 to n - 1, as in ImageNet-V2, they are the outputs of these numbers.

    Args:
        shards: data set.
        classes: names of the classifier's n outputs, in order.

    Returns:
        columns: int64 [k], numbers of the outputs that count, in rising order.
        label_of: int64 [labels of the set], place of each label's output in `columns`.

    Raises:
        UserError: the set has classes that the classifier does not have.
    """
    names = [normal(name) for name in classes_of(shards)]
    numbers = {normal(name): number for number, name in enumerate(classes)}
    if not set(names) <= numbers.keys() and sorted(names) == sorted(map(str, range(len(classes)))):
        numbers = {str(number): number for number in range(len(classes))}
    unknown = [name for name in names if name not in numbers]
    if unknown:
        raise UserError(
            f"{shards.root} has {len(unknown)} of {len(names)} classes that the classifier does "
            f"not have: {', '.join(unknown[:4])}{', ...' if len(unknown) > 4 else ''}; it has "
            f"{len(classes)}: {', '.join(classes[:4])}, ..."
        )
    columns = sorted(numbers[name] for name in names)
    place = {column: i for i, column in enumerate(columns)}
    return torch.tensor(columns), torch.tensor([place[numbers[name]] for name in names])


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
