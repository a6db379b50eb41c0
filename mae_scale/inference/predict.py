"""Predicting: writing what a trained model sees in images, as pictures, JSON and CSV."""

from __future__ import annotations

import argparse
import csv
import io
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from mae_scale.data.bands import Bands
from mae_scale.data.transforms import eval_crop
from mae_scale.errors import RunError, UserError
from mae_scale.files import write_atomically
from mae_scale.inference import pictures
from mae_scale.inference.images import find_images, read_image, shown, write_png
from mae_scale.inference.model import FOREIGN, TrainedModel, chosen_model
from mae_scale.tasks.trained import TrainedRun, best_checkpoint, is_ours
from mae_scale.world import World

log = logging.getLogger("mae_scale")

TABLE = "predictions.csv"
_TABLE_TOP = 5  # number of names of an image in the table


class Seen(NamedTuple):
    """The objects, classes or map that a model sees in one image."""

    facts: dict[str, Any]  # content of the JSON file
    picture: Image.Image
    class_map: np.ndarray | None = None  # uint8 [H, W], classes from 1; None: no segmenter


Predict = Callable[[torch.Tensor], Seen]  # function of an image, uint8 [C, H, W]


def run(options: argparse.Namespace, world: World) -> None:
    """Write what the model sees in each image.

    Args:
        options: arguments of `mae-scale predict`.
        world: this process, whose device is used.

    Raises:
        UserError: there is no run, there are no images, or an option is out of its range.
        RunError: some images could not be read; the results of the others are written.
    """
    if options.out.exists() and not options.out.is_dir():
        raise UserError(f"--out {options.out} is not a folder")
    files = find_images(options.images)
    _check_names(files)
    task, predict, limit, bands = load(options, world.device)
    max_pixels = options.max_pixels or limit
    rows, damaged = [], []
    for file, name in files:
        try:
            image = read_image(file, max_pixels, bands)
        except UserError as error:
            log.warning("%s", error)
            damaged.append(file)
            continue
        seen = predict(image)
        height, width = image.shape[1:]
        facts = {"file": str(file), "task": task, "height": height, "width": width}
        base = options.out / name
        facts |= seen.facts
        if seen.class_map is not None:
            facts["map"] = f"{base.name}.classes.png"
            write_png(base.with_name(facts["map"]), Image.fromarray(seen.class_map))
        write_png(base.with_name(f"{base.name}.png"), seen.picture)
        content = json.dumps(facts, indent=1, ensure_ascii=False)
        write_atomically(base.with_name(f"{base.name}.json"), content + "\n")
        rows.append((str(file), seen.facts.get("classes", [])))
    if task not in _DENSE and rows:
        write_atomically(options.out / TABLE, _table(rows))
    log.info("wrote %s: %d images", options.out, len(rows))
    if damaged:
        raise RunError(f"{len(damaged)} of {len(files)} images cannot be read, as {damaged[0]}")


def _check_names(files: list[tuple[Path, Path]]) -> None:
    """Raise a UserError where two images would have the same outputs."""
    first: dict[Path, Path] = {}
    for file, name in files:
        if first.setdefault(name, file) != file:
            raise UserError(
                f"{first[name]} and {file} would both be written as {name}; give the folder above "
                "them, or call the command twice"
            )


class Predictor(NamedTuple):
    """A function that predicts, and the facts about its images."""

    task: str | None  # task of the run; None: weights from elsewhere
    predict: Predict
    max_pixels: int  # most pixels that an image may have
    bands: Bands


def load(options: argparse.Namespace, device: torch.device) -> Predictor:
    """Read a trained model, and return a function from an image to what the model sees.

    Raises:
        UserError: there is no model, or its task is one whose models cannot predict.
    """
    if is_ours(options.weights):
        folder = best_checkpoint(options.weights)
        if TrainedRun.read(folder).task.name in _DENSE:
            return _dense(TrainedRun.chosen(options.weights), device, options)
    found = chosen_model(options, "classifier")
    found.put(device)
    task = None if found.run is None else found.run.task.name
    return Predictor(task, _classifier(found, device, options), found.max_pixels, found.bands)


def _dense(trained: TrainedRun, device: torch.device, options: argparse.Namespace) -> Predictor:
    task = trained.task.name
    for name in ("img_size", *FOREIGN):
        if getattr(options, name, None) is not None:
            raise UserError(f"--{name} is for classifiers; {trained.run_dir} is a run of {task}")
    model = trained.model_with_weights(options.ema).eval().to(device)
    predict, config = _DENSE[task](trained, model, device, options), trained.config
    return Predictor(task, predict, config.data.max_pixels, Bands.of(config))


def _classifier(found: TrainedModel, device: torch.device, options: argparse.Namespace) -> Predict:
    @torch.no_grad()
    def predict(image: torch.Tensor) -> Seen:
        crop = eval_crop(image, found.size, found.crop_ratio)[None].to(device)
        logits = found.model(found.bands.normalize(crop))[0]
        best = logits.softmax(0).topk(min(options.top, len(found.classes)))
        names = [found.classes[number] for number in best.indices.tolist()]
        scores = best.values.tolist()
        facts = [{"name": n, "score": s} for n, s in zip(names, scores, strict=True)]
        return Seen({"classes": facts}, pictures.ranked_names(shown(image), names, scores))

    return predict


def _detector(
    trained: TrainedRun, model: Any, device: torch.device, options: argparse.Namespace
) -> Predict:
    from mae_scale.data.annotated_transforms import evaluation_input
    from mae_scale.tasks.detect import detect
    from mae_scale.train.detection_scores import as_coco

    config: Any = trained.config

    @torch.no_grad()
    def predict(image: torch.Tensor) -> Seen:
        square, size = evaluation_input(image, config.model.img_size)
        original = torch.tensor([image.shape[1:]])
        inputs = (square[None], torch.tensor([size]), original)
        found = detect(model, config, *(x.to(device) for x in inputs))[0]
        kept = found["scores"] >= options.score
        found = {key: value[kept] for key, value in found.items()}
        numbers, scores = found["classes"].tolist(), found["scores"].tolist()
        names = [trained.classes[number] for number in numbers]
        facts = [
            {"name": name, **{k: each[k] for k in ("score", "bbox", "segmentation")}}
            for name, each in zip(
                names, as_coco(found, 0, range(len(trained.classes))), strict=True
            )
        ]
        masks = found["masks"].cpu().numpy()
        picture = pictures.objects(
            shown(image), found["boxes"].tolist(), masks, names, numbers, scores
        )
        return Seen({"objects": facts}, picture)

    return predict


def _segmenter(
    trained: TrainedRun, model: Any, device: torch.device, options: argparse.Namespace
) -> Predict:
    from mae_scale.tasks.segment import sliding_of
    from mae_scale.train.segmentation_scores import predict_classes

    config: Any = trained.config

    @torch.no_grad()
    def predict(image: torch.Tensor) -> Seen:
        classes = predict_classes(model, image.to(device), sliding_of(config)).cpu().numpy()
        numbers, counts = np.unique(classes, return_counts=True)
        shares = [
            {"name": trained.classes[n], "number": n + 1, "share": c / classes.size}
            for n, c in zip(numbers.tolist(), counts.tolist(), strict=True)
        ]
        shares.sort(key=lambda each: -each["share"])
        picture = pictures.class_map(shown(image), classes, trained.classes)
        return Seen({"classes": shares}, picture, (classes + 1).astype(np.uint8))

    return predict


_DENSE: dict[str, Callable[..., Predict]] = {  # tasks whose models do not classify images
    "detect": _detector,
    "segment": _segmenter,
}


def _table(rows: list[tuple[str, list[dict[str, Any]]]]) -> str:
    """Write the five best names of each image as CSV."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    columns = [f"{what}{i}" for i in range(1, _TABLE_TOP + 1) for what in ("class", "score")]
    writer.writerow(["file", *columns])
    for file, classes in rows:
        best = [(c["name"], f"{c['score']:.6f}") for c in classes[:_TABLE_TOP]]
        best += [("", "")] * (_TABLE_TOP - len(best))
        writer.writerow([file, *(value for pair in best for value in pair)])
    return stream.getvalue()
