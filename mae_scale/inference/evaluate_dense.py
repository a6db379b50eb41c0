"""Evaluation of detectors and segmenters: COCO's average precision, and mIoU."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch

from mae_scale.config.batch import resolve_precision
from mae_scale.data.annotated import DetectionEvalLoader, SegmentationEvalLoader
from mae_scale.data.loader import EvalLoader
from mae_scale.data.reader import shard_cache
from mae_scale.errors import UserError
from mae_scale.files import write_atomically
from mae_scale.inference.model import FOREIGN
from mae_scale.tasks import detect as detection
from mae_scale.tasks import segment as segmentation
from mae_scale.tasks.dense import open_annotated
from mae_scale.tasks.trained import TrainedRun
from mae_scale.train import checkpoint
from mae_scale.train.detection_scores import evaluate_detection
from mae_scale.train.segmentation_scores import MULTI_SCALE, evaluate_segmentation
from mae_scale.world import World

log = logging.getLogger("mae_scale")

_MOST = 8  # largest batch of a detector, in images, which are large
TASKS = ("detect", "segment")  # tasks whose runs are evaluated here


def header(options: argparse.Namespace, trained: TrainedRun | None) -> dict[str, Any]:
    """Begin the results of `mae-scale evaluate`: which weights they are of, without scores.

    Args:
        options: arguments of `mae-scale evaluate`.
        trained: checkpoint that is evaluated; None: weights from elsewhere.
    """
    results: dict[str, Any] = {"weights": str(options.weights), "step": None, "sets": {}}
    if trained is not None:
        results["step"] = checkpoint.Commit.read(trained.folder).step
        results |= {"checkpoint": trained.folder.name, "chosen": trained.why}
    return results


def run(
    options: argparse.Namespace,
    sets: Sequence[tuple[str, str]],
    world: World,
    doing: Callable[[str], None],
) -> None:
    """Evaluate a run of `TASKS` on all sets; rank 0 prints and writes.

    Args:
        options: arguments of `mae-scale evaluate`.
        sets: name and shard folder of each data set.
        world: this process among the others.
        doing: function that is told what this rank is doing, such as `Watchdog.doing`.

    Raises:
        UserError: data or options do not fit the run.
    """
    trained = TrainedRun.chosen(options.weights)
    task, config = trained.task.name, cast(Any, trained.config)
    for name in ("imagenet_c", "tables", "classes_of_data", "img_size", "crop_ratio", *FOREIGN):
        if getattr(options, name, None):
            raise UserError(f"--{name} is for classifiers; {trained.run_dir} is a run of {task}")
    if options.multi_scale and task != "segment":
        raise UserError(f"--multi_scale is for segmenters; {trained.run_dir} is a run of {task}")
    if not sets:
        raise UserError("nothing to evaluate on: give NAME=SHARDS")
    opened = {name: open_annotated(spec, options.cache_dir, task) for name, spec in sets}
    for name, shards in opened.items():
        if list(shards.classes) != trained.classes:
            raise UserError(
                f"{name} has {len(shards.classes)} classes that are not the "
                f"{len(trained.classes)} of {trained.run_dir}"
            )
    model = trained.model_with_weights(options.ema)
    model = model.eval().to(world.device)
    half = resolve_precision(options.precision, world.device) == "bf16"

    def outputs(*inputs: Any) -> Any:
        with torch.autocast(world.device.type, torch.bfloat16, enabled=half):
            return model(*inputs)

    results = header(options, trained)
    for name, shards in opened.items():
        kind = DetectionEvalLoader if task == "detect" else SegmentationEvalLoader
        loader = kind(
            shards,
            img_size=config.model.img_size,
            batch_size=min(options.batch_size, _MOST) if task == "detect" else 1,
            rank=world.rank,
            world_size=world.size,
            workers=options.workers,
            cache_dir=options.cache_dir,
            max_pixels=options.max_pixels or trained.config.data.max_pixels,
        )
        if task == "detect":
            cache = shard_cache(shards, options.cache_dir, None)
            row = evaluate_detection(
                lambda *inputs: detection.detect(outputs, config, *inputs),
                loader,  # type: ignore[arg-type]
                shards,
                device=world.device,
                doing=doing,
                what=f"evaluating {name}",
                cache=cache,
            )
        else:
            row = _segmentation(trained, options, outputs, loader, world, doing, name)
        results["sets"][name] = {"shards": shards.root, **(row or {})}
    if world.rank == 0:
        print(table(results["sets"], trained.task.scores))
        if options.out is not None:
            write_atomically(options.out, json.dumps(results, indent=1) + "\n")


def _segmentation(
    trained: TrainedRun,
    options: argparse.Namespace,
    outputs: Callable[..., Any],
    loader: EvalLoader,
    world: World,
    doing: Callable[[str], None],
    name: str,
) -> dict[str, Any]:
    config: Any = trained.config
    sliding = segmentation.sliding_of(config)
    if options.multi_scale:
        sliding = replace(sliding, scales=MULTI_SCALE, flip=True)
    found = evaluate_segmentation(
        outputs,
        loader,  # type: ignore[arg-type]
        sliding,
        classes=len(trained.classes),
        device=world.device,
        doing=doing,
        what=f"evaluating {name}",
    )
    assert found is not None  # it is None only where something stops it, and nothing can here
    ious = [100 * iou if iou == iou else None for iou in found.per_class().tolist()]
    return {**found.row(), "per_class": dict(zip(trained.classes, ious, strict=True))}


def table(sets: dict[str, Any], scores: Any) -> str:
    """Format the scores: one line per set, and in detection one for boxes and one for masks.

    Args:
        sets: row of scores by name of the set.
        scores: label of each score by its name, as `Task.scores`.
    """
    kinds: dict[str, dict[str, str]] = {}
    for key, label in scores.items():
        kind, _, rest = (
            label.partition(" ") if label.startswith(("box ", "mask ")) else ("", "", "")
        )
        kinds.setdefault(kind, {})[key] = (rest or label).removesuffix(", %").removeprefix("AP, ")
    heads = next(iter(kinds.values())).values()
    width = max(9, *(len(head) + 2 for head in heads))
    lines = [f"{'set':<20}{'images':>7}{'':5}" + "".join(f"{head:>{width}}" for head in heads)]
    for name, row in sets.items():
        for kind, columns in kinds.items():
            values = "".join(f"{row[key]:>{width}.2f}" for key in columns)
            lines.append(f"{name:<20}{row['images']:>7} {kind:<4}{values}")
    return "\n".join(lines)
