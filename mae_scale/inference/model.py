"""Trained models of any origin: runs, exports, and the weights of other programs."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from mae_scale.config.batch import resolve_precision
from mae_scale.config.sizes import ImageSize, plain_size
from mae_scale.data.bands import Bands
from mae_scale.data.formats import MAX_PIXELS
from mae_scale.data.loader import EvalLoader
from mae_scale.data.shards import ShardSet
from mae_scale.data.transforms import default_crop_ratio
from mae_scale.errors import UserError
from mae_scale.models import Classifier, MaskedAutoencoderViT, build_classifier, build_mae
from mae_scale.models.classifier import keep_statistics_in_fp32
from mae_scale.models.description import Description, describe
from mae_scale.models.encoder import Pool
from mae_scale.models.hugging_face import StateDict
from mae_scale.models.weights import fit_to_classifier, fit_to_mae, read_weights
from mae_scale.sharding.lists import read_classes
from mae_scale.tasks.trained import (
    TrainedRun,
    bands_of,
    grid_in,
    grid_of,
    is_ours,
)
from mae_scale.train.checkpoint import Commit
from mae_scale.world import World

Use = Literal["encoder", "classifier", "autoencoder"]
# Tasks whose runs hold a model for each use.
TASKS: dict[Use, tuple[str, ...]] = {
    "encoder": ("pretrain", "finetune", "linprobe"),
    "classifier": ("finetune", "linprobe"),
    "autoencoder": ("pretrain",),
}
# Arguments of `read_model` that are for weights from elsewhere: a run says all this itself.
FOREIGN = ("model", "num_heads", "decoder_num_heads", "norm_pix_loss", "classes")


@dataclass
class TrainedModel:
    """A model for inference, and what its images need."""

    model: Any
    """`MaskedAutoencoderViT` or `Classifier`, in evaluation mode."""
    source: str
    """Path of the weights and, for a run, the step; for messages."""
    bands: Bands
    """Bands of the images, and how they are normalised."""
    crop_ratio: float
    """Share of the short side that the centre crop covers."""
    max_pixels: int
    """Most pixels that an image may have."""
    classes: list[str]
    """Names of a classifier's outputs, in order."""
    run: TrainedRun | None = None
    """The run; None: weights from elsewhere."""
    pool: Pool = "token"
    """Features that describe an image: the class token's ("token"), or the patches' mean."""

    @property
    def size(self) -> ImageSize:
        """Height and width of the images in pixels."""
        return self.model.patch_embed.img_size

    @property
    def step(self) -> int | None:
        """Optimiser steps that the run had done; None: foreign weights, which do not say it."""
        return None if self.run is None else Commit.read(self.run.folder).step

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Describe normalised images, float [b, C, H, W], by their features, [b, D]."""
        if isinstance(self.model, MaskedAutoencoderViT):
            return self.model.features(images, self.pool)
        return self.model.features(images)

    def put(self, device: torch.device, precision: str = "fp32") -> None:
        """Move the model to a device, in bf16 if the precision (auto, bf16 or fp32) says so."""
        self.model.to(device)
        if resolve_precision(precision, device) == "bf16":
            self.model.bfloat16()
            keep_statistics_in_fp32(self.model)

    def loader(self, shards: ShardSet, options: argparse.Namespace, world: World) -> EvalLoader:
        """Make the loader of this rank's part of some shards.

        Args:
            shards: shards to load.
            options: arguments that `commands.arguments.add_loading` adds.
            world: this process among the others.
        """
        return EvalLoader(
            shards,
            img_size=self.size,
            batch_size=options.batch_size,
            rank=world.rank,
            world_size=world.size,
            pin_memory=world.device.type == "cuda",
            workers=options.workers,
            crop_ratio=self.crop_ratio,
            cache_dir=options.cache_dir,
            max_pixels=options.max_pixels or self.max_pixels,
            bands=self.bands,
        )


def chosen_model(
    options: argparse.Namespace, use: Use, fallback: list[str] | None = None
) -> TrainedModel:
    """Read the model that the options of a command name; arguments are those of `read_model`."""
    names = (read_model.__kwdefaults__ or {}).keys() & vars(options).keys()
    given = {name: getattr(options, name) for name in names}
    return read_model(options.weights, use, fallback=fallback, **given)


def read_model(
    weights: str | Path,
    use: Use,
    *,
    ema: bool = False,
    img_size: ImageSize | None = None,
    crop_ratio: float | None = None,
    pool: Pool | None = None,
    model: str | None = None,
    num_heads: int | None = None,
    decoder_num_heads: int | None = None,
    norm_pix_loss: str | None = None,
    classes: str | None = None,
    fallback: list[str] | None = None,
) -> TrainedModel:
    """Read a trained model, in fp32 on the CPU; all ranks call.

    Args:
        weights: run folder, a step folder in one, or foreign weights.
        use: "encoder": the features of images, from any model; "classifier"; "autoencoder": a
            masked autoencoder with its decoder.
        ema: whether to take the moving average of the weights.
        img_size: side, or height and width, of the images in pixels; None: that of the weights.
        crop_ratio: share of the short side that the centre crop covers; None: that of the weights.
        pool: features that describe an image; None: the class token of a masked autoencoder, and
            for a classifier the features that its head gets.
        model, num_heads, decoder_num_heads: architecture and attention heads of foreign weights;
            None: those that they name.
        norm_pix_loss: "true" or "false": whether foreign weights predict normalised pixels; None:
            they say it.
        classes: file or shards that name the outputs of foreign weights; None: they name them.
        fallback: names of the outputs where neither `classes` nor the weights say them; None: the
            numbers from 0 on.

    Raises:
        UserError: there is no such model, or it does not fit the other arguments.
    """
    foreign = dict(
        zip(FOREIGN, (model, num_heads, decoder_num_heads, norm_pix_loss, classes), strict=True)
    )
    if is_ours(weights):
        given = [f"--{name}" for name, value in foreign.items() if value is not None]
        if given:
            raise UserError(f"{' and '.join(given)}: {weights} is a run, which says that itself")
        found = _of_run(weights, use, ema, img_size)
    elif not Path(weights).exists():
        raise UserError(f"there is no run folder, step folder or file of weights {weights}")
    elif ema:
        raise UserError(f"--ema: {weights} is no run folder, which a moving average is in")
    else:
        found = _of_weights(weights, use, img_size, foreign, fallback)
    found.crop_ratio = crop_ratio or found.crop_ratio or default_crop_ratio(found.size)
    if isinstance(found.model, Classifier):
        found.pool = found.model.pool
        if pool not in (None, found.pool):
            raise UserError(
                f"--pool {pool}: {weights} has a head that classifies the {found.pool} of its "
                f"features; leave it out, or take --pool {found.pool}"
            )
    found.pool = pool or found.pool
    return found


def _of_run(weights: str | Path, use: Use, ema: bool, img_size: ImageSize | None) -> TrainedModel:
    trained = TrainedRun.chosen(weights)
    if trained.task.name not in TASKS[use]:
        raise UserError(
            f"{trained.run_dir} is a run of {trained.task.name}; expected one of "
            f"{' or '.join(TASKS[use])}"
        )
    section, state = trained.config.model, trained.weights(ema)
    same_size = img_size is None or plain_size(img_size) == plain_size(section.img_size)
    return TrainedModel(
        _filled(lambda: trained.model(img_size), state, grid_of(trained.folder, state), use),
        f"{trained.run_dir.resolve().name}, {trained.folder.name}",
        Bands.of(trained.config),
        (getattr(section, "crop_ratio", None) if same_size else None) or 0,
        trained.config.data.max_pixels,
        trained.classes,
        trained,
    )


def _of_weights(
    path: str | Path,
    use: Use,
    img_size: ImageSize | None,
    foreign: dict[str, Any],
    fallback: list[str] | None,
) -> TrainedModel:
    state, described = read_weights(path), describe(path)
    name, sizes = described.arguments(
        path,
        state,
        name=foreign["model"],
        num_heads=foreign["num_heads"],
        decoder_num_heads=foreign["decoder_num_heads"],
        decoder="decoder_embed.weight" in state and use != "classifier",
    )
    bands, grid = bands_of(path, described, sizes), grid_in(sizes)
    same_size = img_size is None or sizes.get("img_size") == plain_size(img_size)
    if img_size is not None:
        sizes["img_size"] = img_size
    classes: list[str] = []
    is_classifier = use == "classifier" or (use == "encoder" and "fc_norm.weight" in state)
    if is_classifier:
        outputs = _outputs_of(state)
        if use == "classifier":
            classes = _names(path, outputs, described, foreign["classes"], fallback)
        kinds = {"head.0.running_mean": "probe", "head.fc1.weight": "mlp"}
        sizes["head"] = next((kinds[key] for key in kinds if key in state), "linear")
        sizes["pool"] = "mean" if "fc_norm.weight" in state else "token"
    switches = dict(described.switches)
    if foreign["norm_pix_loss"] is not None:
        switches["norm_pix_loss"] = foreign["norm_pix_loss"] == "true"
    if use == "autoencoder" and "norm_pix_loss" not in switches:
        raise UserError(
            f"{path} does not say whether it predicts normalised pixels, and published weights "
            "exist in both kinds; add --norm_pix_loss true or --norm_pix_loss false"
        )

    def build() -> Any:
        if is_classifier:
            return build_classifier(name, outputs or 2, **sizes)
        return build_mae(name, **switches, **sizes)

    model = _filled(build, state, grid, use)
    ratio = (described.crop_ratio if same_size else None) or 0
    return TrainedModel(model, str(path), bands, ratio, MAX_PIXELS, classes)


def _outputs_of(state: StateDict) -> int:
    """Return the number of outputs of a classifier's head; 0: there is no head."""
    head = [value for key, value in state.items() if key.startswith("head.")]
    return len(head[-1]) if head else 0


def _names(
    path: str | Path,
    outputs: int,
    described: Description,
    named: str | None,
    fallback: list[str] | None,
) -> list[str]:
    """Return the names of the outputs of foreign weights."""
    if not outputs:
        raise UserError(f"weights: {path} has no head; fine-tune it first")
    numbers = [str(number) for number in range(outputs)]
    classes = read_classes(named) if named else described.classes or fallback or numbers
    if len(classes) != outputs:
        raise UserError(
            f"weights: the head has {outputs} outputs, but there are {len(classes)} classes; name "
            "those of the head with --classes"
        )
    return classes


def _filled(build: Any, state: StateDict, grid: tuple[int, int] | None, use: Use) -> Any:
    """Build a model with weights, whose shapes are checked before it takes memory.

    Keys of a decoder or a head may be missing in an encoder: its features do not use them.
    """
    with torch.device("meta"):
        model = build()
    if isinstance(model, MaskedAutoencoderViT):
        fitting = fit_to_mae(state, model, whole=use == "autoencoder", grid=grid)
    else:
        fitting = fit_to_classifier(state, model, whole=use == "classifier", grid=grid)
    model = build()
    model.load_state_dict(fitting, strict=use != "encoder")
    return model.eval()
