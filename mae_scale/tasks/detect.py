"""`mae-scale detect`: Mask R-CNN on COCO, from weights or from scratch (paper Table 4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mae_scale.config.detect import DetectConfig
from mae_scale.config.sections import given
from mae_scale.data.annotated import AnnotatedTrainLoader, DetectionEvalLoader
from mae_scale.data.annotated_transforms import (
    DetectionTransform,
    normalize_padded,
    unpack_masks,
)
from mae_scale.data.shards import ShardSet
from mae_scale.errors import UserError
from mae_scale.launch.watchdog import Watchdog
from mae_scale.models.detector import Detector, build_detector
from mae_scale.models.proposals import Targets, paste_masks
from mae_scale.tasks.classification import notes
from mae_scale.tasks.dense import initial_weights, open_annotated, validation_loader
from mae_scale.tasks.validating import validation_by
from mae_scale.train.detection_scores import evaluate_detection
from mae_scale.train.ds import DeepSpeedEngine
from mae_scale.train.loaders import train_loader
from mae_scale.train.loop import Batch, Validation
from mae_scale.train.run import TrainingSetup
from mae_scale.world import World


def build(config: DetectConfig, num_classes: int) -> Detector:
    """Build the model of a run, on the device of the context."""
    return build_detector(num_classes=num_classes, **given(config.model))


def trial_loss(model: Any, images: torch.Tensor) -> torch.Tensor:
    """Return the loss of images, uint8 [B, 3, S, S], with one made-up object in each.

    On the meta device, which can choose no proposals, the losses are left out and the heads get as
    many regions as they can get: `rois` for each image, a quarter of them with a mask.
    """
    number, size = len(images), images.shape[-1]
    if not images.is_meta:
        sizes = torch.full((number, 2), size, device=images.device)
        corner = [size // 4, size // 4, size // 2, size // 2]
        target = {
            "boxes": torch.tensor([corner], dtype=torch.float32, device=images.device),
            "classes": torch.zeros(1, dtype=torch.int64, device=images.device),
            "masks": torch.ones(1, size, size, dtype=torch.bool, device=images.device),
        }
        losses = model(images.float(), sizes, [dict(target) for _ in range(number)])
        return torch.stack(list(losses.values())).sum()
    heads, rois = model.roi_heads, number * model.roi_heads.fg_bg_sampler.batch_size_per_image
    maps = model.pyramid(model.backbone(images.float()))
    box_rois, mask_rois = (
        maps[0].new_empty(n, maps[0].shape[1], side, side, dtype=torch.float32, requires_grad=True)
        for n, side in ((rois, 7), (rois // 4, 14))
    )
    outputs = [
        *(x for found in model.rpn.head(maps) for x in found),
        *heads.box_predictor(heads.box_head(box_rois)),
        heads.mask_predictor(heads.mask_head(mask_rois)),
    ]
    return torch.stack([x.float().sum() for x in outputs]).sum()


def prepare(config: DetectConfig, world: World) -> TrainingSetup:
    """Put together model, data, loss and validation of a run.

    Raises:
        UserError: shards, weights or settings cannot be used.
    """
    shards = open_annotated(config.data.train, config.data.cache_dir, "detect")
    low, high = config.augment.scale
    transform = DetectionTransform(shards.categories, config.augment.recipe, (low, high))
    loader = train_loader(config, world, shards, transform, AnnotatedTrainLoader)
    with torch.device("meta"):  # without weights, which `train` makes later
        model = build(config, len(shards.categories))

    def loss_of(engine: DeepSpeedEngine, batch: Batch, step: int, micro: int) -> torch.Tensor:
        images = normalize_padded(batch["image"], batch["size"])
        losses = engine(images, batch["size"], targets_of(batch))
        return torch.stack(list(losses.values())).sum()

    return TrainingSetup(
        "detect",
        model,
        shards,
        loader,
        loss_of,
        trial_loss,
        weights=initial_weights(config, model),
        validation=_validation(config, world, shards),
        notes=notes(category_names(shards)),
    )


def category_names(shards: ShardSet) -> list[str]:
    """List the names of the categories in the order of their ids, which is that of the classes."""
    ordered = sorted(shards.categories, key=lambda category: category["id"])
    return [str(category["name"]) for category in ordered]


def targets_of(batch: Batch) -> Targets:
    """Split the objects of a batch by image, in the form that `Detector` takes.

    Args:
        batch: batch of `AnnotatedTrainLoader`; "objects" is the number of objects of each image,
            and "boxes", "classes" and "masks" hold those of all images one after the other.
    """
    counts, size = batch["objects"].tolist(), batch["image"].shape[-1]
    parts = [batch[key].split(counts) for key in ("boxes", "classes", "masks")]
    return [
        {"boxes": boxes, "classes": classes, "masks": unpack_masks(masks, size)}
        for boxes, classes, masks in zip(*parts, strict=True)
    ]


def detect(
    model: Callable[..., Any],
    config: DetectConfig,
    images: torch.Tensor,
    sizes: torch.Tensor,
    originals: torch.Tensor,
) -> list[dict[str, torch.Tensor]]:
    """Detect objects in images; boxes and masks are in the pixels of the files.

    The padding is that of training: with the recipe li2021 the model sees grey padding as a part
    of the image, with vitdet the padding has the mean colour.

    Args:
        model: `Detector`, or an engine around it; not in training mode.
        config: config of the run.
        images: uint8 [B, 3, S, S], padded with grey.
        sizes: int64 [B, 2], height and width without padding.
        originals: int64 [B, 2], height and width in the file.

    Returns:
        One dict per image: "boxes", float32 [N, 4], x0, y0, x1, y1; "classes", int64 [N], from 0;
        "scores", float32 [N], from 0 to 1; "masks", bool [N, H, W].
    """
    shown = torch.full_like(sizes, images.shape[-1]) if config.augment.recipe == "li2021" else sizes
    found = model(normalize_padded(images, shown), shown)
    for each, size, original in zip(found, sizes.tolist(), originals.tolist(), strict=True):
        h, w = original
        scale = each["boxes"].new_tensor([w / size[1], h / size[0]] * 2)
        boxes = each["boxes"] * scale
        boxes = boxes.clamp(min=0).minimum(boxes.new_tensor([w, h, w, h]))
        kept = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)  # boxes without area lie in the padding
        each |= {key: value[kept] for key, value in each.items()} | {"boxes": boxes[kept]}
        each["masks"] = paste_masks(each["masks"], each["boxes"], (h, w))
    return found


def _validation(config: DetectConfig, world: World, train: ShardSet) -> Validation | None:
    """Make the validation that computes COCO's numbers on data.val; None without data.val.

    Raises:
        UserError: there are no shards, or their categories are not those of the training shards.
    """
    if config.data.val is None:
        return None
    shards = open_annotated(config.data.val, config.data.cache_dir, "detect")
    ids, others = ({c["id"] for c in each.categories} for each in (train, shards))
    if ids != others:
        raise UserError(
            f"data.val {shards.root} has other categories than data.train; their manifests must "
            "list the same"
        )
    batch = config.train.micro_batch_size
    loader = validation_loader(DetectionEvalLoader, config, world, shards, batch)

    def scores(
        engine: DeepSpeedEngine, watchdog: Watchdog, stop: Callable[[], bool]
    ) -> dict[str, float] | None:
        return evaluate_detection(
            lambda *inputs: detect(engine, config, *inputs),
            loader,
            shards,
            device=world.device,
            doing=watchdog.doing,
            what="validating",
            stop=stop,
        )

    return validation_by(config, config.train.validate_epochs, scores)
