"""Trained classifiers of any origin: runs, exports, and the weights of other programs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from mae_scale.config.sizes import ImageSize, plain_size
from mae_scale.data.bands import RGB, Bands
from mae_scale.data.formats import MAX_PIXELS
from mae_scale.errors import UserError
from mae_scale.launch.distributed import on_rank0
from mae_scale.models.classifier import Classifier, build_classifier
from mae_scale.models.description import describe
from mae_scale.models.hugging_face import StateDict
from mae_scale.models.weights import fit_to_classifier, read_weights
from mae_scale.tasks.trained import (
    TrainedRun,
    bands_of,
    best_checkpoint,
    grid_in,
    grid_of,
    is_ours,
)
from mae_scale.train.checkpoint import Commit


@dataclass
class Trained:
    """A classifier, and the facts that evaluation needs about it."""

    model: Classifier
    """The classifier, in fp32 on the CPU."""
    classes: list[str]
    """Names of the outputs, in order."""
    crop_ratio: float | None
    """Share of the short side that the centre crop covers; None: the usual one for the size."""
    step: int | None
    """Optimiser steps that the run had done; None: foreign weights, which do not say it."""
    max_pixels: int = MAX_PIXELS
    """Most pixels that an image may have."""
    bands: Bands = RGB
    """Bands of the images, and how they are normalised."""


def read_classifier(
    weights: str | Path,
    *,
    name: str | None = None,
    classes: list[str] | None = None,
    fallback: list[str] | None = None,
    img_size: ImageSize | None = None,
    ema: bool = False,
) -> Trained:
    """Read a classifier in fp32 on the CPU; all ranks call.

    Args:
        weights: run folder of finetune or linprobe, a step folder in one, or foreign weights.
        name: architecture of foreign weights; None: the one that they name.
        classes: names of the outputs of foreign weights; None: those that the weights name.
        fallback: names of the outputs where neither `classes` nor the weights say them; None: the
            numbers from 0 on.
        img_size: side, or height and width, of the images in pixels; None: that of the weights.
        ema: whether to take the moving average of the weights.

    Raises:
        UserError: there is no classifier, or it does not fit the other arguments.
    """
    if is_ours(weights):
        return _of_run(weights, img_size, ema)
    if ema:
        raise UserError(f"--ema: {weights} is no run folder, which a moving average is in")
    state = read_weights(weights)
    described = describe(weights)
    name = name or described.name
    if name is None:
        raise UserError(f"{weights} is no run folder and does not say what it is: --model NAME")
    head = [value for key, value in state.items() if key.startswith("head.")]
    if not head:
        raise UserError(f"weights: {weights} has no head; fine-tune it first")
    numbers = [str(number) for number in range(len(head[-1]))]
    classes = classes or described.classes or fallback or numbers
    if len(classes) != len(numbers):
        raise UserError(
            f"weights: the head has {len(numbers)} outputs, but there are {len(classes)} classes; "
            "name those of the head with --classes"
        )
    sizes = described.sizes_for(state)
    bands, grid = bands_of(weights, described, sizes), grid_in(sizes)
    same_size = img_size is None or sizes.get("img_size") == plain_size(img_size)
    if img_size is not None:
        sizes["img_size"] = img_size
    pool = "mean" if "fc_norm.weight" in state else "token"
    kinds = {"head.0.running_mean": "probe", "head.fc1.weight": "mlp"}
    kind = next((kinds[key] for key in kinds if key in state), "linear")

    def build() -> Classifier:
        return build_classifier(name, len(classes), pool=pool, head=kind, **sizes)

    model = _filled(build, state, grid)
    crop_ratio = described.crop_ratio if same_size else None
    return Trained(model, classes, crop_ratio, None, bands=bands)


def _filled(
    build: Callable[[], Classifier], state: StateDict, grid: tuple[int, int] | None
) -> Classifier:
    """Build a classifier with weights, whose shapes are checked before it takes memory."""
    with torch.device("meta"):
        fitting = fit_to_classifier(state, build(), whole=True, grid=grid)
    model = build()
    model.load_state_dict(fitting)
    return model


def _of_run(weights: str | Path, img_size: ImageSize | None, ema: bool) -> Trained:
    trained = TrainedRun.read(on_rank0(lambda: best_checkpoint(weights)))
    if not trained.classes:
        raise UserError(f"{trained.run_dir} is no run of finetune or linprobe: it has no classes")
    state = trained.weights(ema)
    model = _filled(lambda: trained.model(img_size), state, grid_of(trained.folder, state))
    section = trained.config.model
    same_size = img_size is None or plain_size(img_size) == plain_size(section.img_size)
    crop_ratio = getattr(section, "crop_ratio", None) if same_size else None
    step = Commit.read(trained.folder).step
    limit, bands = trained.config.data.max_pixels, Bands.of(trained.config)
    return Trained(model, trained.classes, crop_ratio, step, limit, bands)
