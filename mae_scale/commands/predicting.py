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

from mae_scale.commands import drawing
from mae_scale.data.bands import Bands, for_display
from mae_scale.data.formats import IMAGE_SUFFIXES, image_files
from mae_scale.data.transforms import default_crop_ratio, eval_crop
from mae_scale.errors import RunError, UserError
from mae_scale.files import read_file, write_atomically
from mae_scale.sharding.lists import read_classes
from mae_scale.tasks.classifiers import Trained, read_classifier
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
    if options.top < 1:
        raise UserError(f"--top {options.top} must be at least 1")
    if options.max_pixels is not None and options.max_pixels < 1:
        raise UserError(f"--max_pixels {options.max_pixels} must be at least 1")
    if not 0 <= options.score <= 1:
        raise UserError(f"--score {options.score} must lie in 0 to 1")
    if options.out.exists() and not options.out.is_dir():
        raise UserError(f"--out {options.out} is not a folder")
    files = find_images(options.images)
    task, predict, limit, bands = load(options, world.device)
    max_pixels = options.max_pixels or limit
    rows, damaged = [], []
    for file, name in files:
        try:
            image = bands.decode(read_file(file), max_pixels)
        except (ValueError, OSError) as error:
            text = f"cannot be read: {error.strerror}" if isinstance(error, OSError) else error
            log.warning("%s %s", file, text)
            damaged.append(file)
            continue
        seen = predict(image)
        height, width = image.shape[1:]
        facts = {"file": str(file), "task": task, "height": height, "width": width}
        base = options.out / name
        base.parent.mkdir(parents=True, exist_ok=True)
        facts |= seen.facts
        if seen.class_map is not None:
            facts["map"] = f"{base.name}.classes.png"
            write_atomically(base.with_name(facts["map"]), _png(Image.fromarray(seen.class_map)))
        write_atomically(base.with_name(f"{base.name}.png"), _png(seen.picture))
        content = json.dumps(facts, indent=1, ensure_ascii=False)
        write_atomically(base.with_name(f"{base.name}.json"), content + "\n")
        rows.append((str(file), seen.facts.get("classes", [])))
    if task not in _DENSE and rows:
        write_atomically(options.out / TABLE, _table(rows))
    log.info("wrote %s: %d images", options.out, len(rows))
    if damaged:
        raise RunError(f"{len(damaged)} of {len(files)} images cannot be read, as {damaged[0]}")


def find_images(paths: list[Path]) -> list[tuple[Path, Path]]:
    """List image files, each with the path of its outputs, relative to OUT and without an ending.

    Args:
        paths: image files, and folders of them.

    Raises:
        UserError: there are no images, or two would have the same outputs.
    """
    found: list[tuple[Path, Path]] = []
    for path in paths:
        if path.is_dir():
            inside = image_files(path)
            if not inside:
                raise UserError(f"{path} holds no images (.{', .'.join(IMAGE_SUFFIXES)})")
            found += [(p, p.relative_to(path)) for p in inside]
        elif path.is_file():
            found.append((path, Path(path.name)))
        else:
            raise UserError(f"there is no image or folder {path}")
    first: dict[Path, Path] = {}
    for file, name in found:
        if name in first and first[name] != file:
            raise UserError(
                f"{first[name]} and {file} would both be written as {name}; give the folder above "
                "them, or call the command twice"
            )
        first[name] = file
    return list(dict.fromkeys(found))


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
    trained = None
    if is_ours(options.weights):
        trained = TrainedRun.read(best_checkpoint(options.weights))
        if trained.task.name not in (*_CLASSIFIERS, *_DENSE):
            raise UserError(
                f"{trained.run_dir} is a run of {trained.task.name}; predict takes runs of "
                f"{', '.join((*_CLASSIFIERS, *_DENSE))} (mae-scale reconstruct draws what "
                "pre-training sees)"
            )
        if trained.task.name in _DENSE:
            return _dense(trained, device, options)
    elif not options.weights.exists():
        raise UserError(f"there is no run folder, step folder or file of weights {options.weights}")
    found = read_classifier(
        options.weights,
        name=options.model,
        classes=None if options.classes is None else read_classes(options.classes),
        img_size=options.img_size,
        ema=options.ema,
    )
    task = None if trained is None else trained.task.name
    return Predictor(task, _classifier(found, device, options), found.max_pixels, found.bands)


def _dense(trained: TrainedRun, device: torch.device, options: argparse.Namespace) -> Predictor:
    for name in ("model", "classes", "img_size"):
        if getattr(options, name) is not None:
            task = trained.task.name
            raise UserError(f"--{name} is for classifiers; {trained.run_dir} is a run of {task}")
    model = trained.model_with_weights(options.ema).eval().to(device)
    predict = _DENSE[trained.task.name](trained, model, device, options)
    config = trained.config
    return Predictor(trained.task.name, predict, config.data.max_pixels, Bands.of(config))


def _classifier(found: Trained, device: torch.device, options: argparse.Namespace) -> Predict:
    model, classes, bands = found.model.eval().to(device), found.classes, found.bands
    size = model.patch_embed.img_size
    ratio = found.crop_ratio or default_crop_ratio(size)

    @torch.no_grad()
    def predict(image: torch.Tensor) -> Seen:
        crop = eval_crop(image, size, ratio)[None].to(device)
        logits = model(bands.normalize(crop))[0]
        best = logits.softmax(0).topk(min(options.top, len(classes)))
        names = [classes[number] for number in best.indices.tolist()]
        scores = best.values.tolist()
        facts = [{"name": n, "score": s} for n, s in zip(names, scores, strict=True)]
        return Seen({"classes": facts}, drawing.ranked_names(_pixels(image), names, scores))

    return predict


def _detector(
    trained: TrainedRun, model: Any, device: torch.device, options: argparse.Namespace
) -> Predict:
    from mae_scale.data.annotated_transforms import (
        evaluation_input,
    )
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
        picture = drawing.objects(
            _pixels(image), found["boxes"].tolist(), masks, names, numbers, scores
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
        picture = drawing.class_map(_pixels(image), classes, trained.classes)
        return Seen({"classes": shares}, picture, (classes + 1).astype(np.uint8))

    return predict


_CLASSIFIERS = ("finetune", "linprobe")  # tasks whose models classify
_DENSE: dict[str, Callable[..., Predict]] = {  # the other tasks
    "detect": _detector,
    "segment": _segmenter,
}


def _pixels(image: torch.Tensor) -> np.ndarray:
    return for_display(image[None])[0].permute(1, 2, 0).numpy()


def _png(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


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
