"""`mae-scale detect`: Mask R-CNN on COCO, from weights or from scratch (paper Table 4)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from mae_scale.config.dense import DetectConfig
from mae_scale.config.sections import given
from mae_scale.data.annotated import AnnotatedTrainLoader, DetectionEvalLoader
from mae_scale.data.annotated_transforms import (
    DetectionTransform,
    normalize_padded,
    unpack_masks,
)
from mae_scale.data.shards import ShardSet, open_shards
from mae_scale.errors import UserError
from mae_scale.launch.watchdog import Watchdog
from mae_scale.models.dense_weights import fit_to_dense_model
from mae_scale.models.detector import Detector, build_detector
from mae_scale.models.proposals import Targets, paste_masks
from mae_scale.tasks.classification import notes
from mae_scale.tasks.summary import fitted
from mae_scale.tasks.trained import read_any
from mae_scale.tasks.validating import validation_by
from mae_scale.train.detection_scores import evaluate_detection
from mae_scale.train.ds import DeepSpeedEngine
from mae_scale.train.loop import Batch, Validation
from mae_scale.train.run import TrainingSetup, train_loader
from mae_scale.world import World

log = logging.getLogger("mae_scale")


def build(config: DetectConfig, num_classes: int) -> Detector:
    """Build the model of a run."""
    return build_detector(num_classes=num_classes, **given(config.model))


def flops(model: Detector) -> int:
    """Operations of one image in a training step, counted by PyTorch on the meta device.

    The backward pass counts twice the forward one. A quarter of the proposals is given to the mask
    head, which is the most that it gets.
    """
    size, channels = model.backbone.patch_embed.img_size[0], model.rpn.head.cls_logits.in_channels
    heads, rois = model.roi_heads, model.roi_heads.fg_bg_sampler.batch_size_per_image
    was_training = model.training
    model.eval()
    place = next(model.parameters()).device
    with torch.no_grad(), torch.device(place), FlopCounterMode(display=False) as counter:
        maps = model.pyramid(model.backbone(torch.zeros(1, 3, size, size)))
        model.rpn.head(maps)
        heads.box_predictor(heads.box_head(torch.zeros(rois, channels, 7, 7)))
        heads.mask_predictor(heads.mask_head(torch.zeros(rois // 4, channels, 14, 14)))
    model.train(was_training)
    return 3 * counter.get_total_flops()


def prepare(config: DetectConfig, world: World) -> TrainingSetup:
    """Put together what is trained.

    Raises:
        UserError: shards, weights or settings that cannot be used.
    """
    shards = open_detection(config.data.train, config.data.cache_dir)
    low, high = config.augment.scale
    transform = DetectionTransform(shards.categories, config.augment.recipe, (low, high))
    loader = train_loader(config, world, shards, transform, AnnotatedTrainLoader)
    with torch.device("meta"):  # no weights yet
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
        flops(model),
        weights=_initial_weights(config, model),
        validation=_validation(config, world, shards),
        notes=notes(category_names(shards)),
    )


def open_detection(path: str, cache_dir: str | None) -> ShardSet:
    """Open shards with the annotations of COCO.

    Raises:
        UserError: there are none, or they hold something else.
    """
    shards = open_shards(path, cache_dir)
    if shards.task != "detection":
        raise UserError(
            f"{shards.root} holds shards for {shards.task}; detect needs those that `mae-scale "
            "shard` makes of a COCO folder"
        )
    return shards


def category_names(shards: ShardSet) -> list[str]:
    """The names of the categories in the order of their ids, which is that of the classes."""
    ordered = sorted(shards.categories, key=lambda category: category["id"])
    return [str(category["name"]) for category in ordered]


def targets_of(batch: Batch) -> Targets:
    """Give `Detector` the objects of a batch, image by image."""
    counts, size = batch["objects"].tolist(), batch["image"].shape[-1]
    parts = [batch[key].split(counts) for key in ("boxes", "classes", "masks")]
    return [
        {"boxes": boxes, "classes": classes, "masks": unpack_masks(masks, size)}
        for boxes, classes, masks in zip(*parts, strict=True)
    ]


def detect(
    model: Callable[..., Any], images: torch.Tensor, sizes: torch.Tensor, originals: torch.Tensor
) -> list[dict[str, torch.Tensor]]:
    """Detect objects in images; boxes and masks are in the pixels of the files.

    Args:
        model: `Detector`, or an engine around it; not in training mode.
        images: uint8 [B, 3, S, S], padded.
        sizes: int64 [B, 2], height and width without padding.
        originals: int64 [B, 2], height and width in the file.

    Returns:
        Of each image "boxes" float32 [N, 4], "classes" int64 [N] from 0, "scores" float32 [N],
        "masks" bool [N, H, W].
    """
    found = model(normalize_padded(images, sizes), sizes)
    for each, size, original in zip(found, sizes.tolist(), originals.tolist(), strict=True):
        h, w = original
        scale = each["boxes"].new_tensor([w / size[1], h / size[0]] * 2)
        boxes = each["boxes"] * scale
        each["boxes"] = boxes.clamp(min=0).minimum(boxes.new_tensor([w, h, w, h]))
        each["masks"] = paste_masks(each["masks"], each["boxes"], (h, w))
    return found


def _initial_weights(
    config: DetectConfig, model: Detector
) -> Callable[[], dict[str, torch.Tensor]] | None:
    if config.weights is None:
        return None
    path = Path(config.weights)

    def read() -> dict[str, torch.Tensor]:
        state = read_any(path)
        weights = fit_to_dense_model(state, model, new_head=config.new_head)
        log.info("from %s: %s", path, fitted(state, weights, model))
        return weights

    return read


def _validation(config: DetectConfig, world: World, train: ShardSet) -> Validation | None:
    """COCO's numbers on data.val.

    Raises:
        UserError: no shards, or their categories are not those of the training shards.
    """
    if config.data.val is None:
        return None
    shards = open_detection(config.data.val, config.data.cache_dir)
    ids, others = ({c["id"] for c in each.categories} for each in (train, shards))
    if ids != others:
        raise UserError(
            f"data.val {shards.root} has other categories than data.train; their manifests must "
            "list the same"
        )
    loader = DetectionEvalLoader(
        shards,
        img_size=config.model.img_size,
        batch_size=config.train.micro_batch_size,
        rank=world.rank,
        world_size=world.size,
        workers=config.data.worker_processes,
        crop_ratio=None,
        pin_memory=world.device.type == "cuda",
        cache_dir=config.data.cache_dir,
        cache_bytes=int(config.data.cache_gb * 1e9),
        max_pixels=config.data.max_pixels,
    )

    def scores(
        engine: DeepSpeedEngine, watchdog: Watchdog, stop: Callable[[], bool]
    ) -> dict[str, float] | None:
        return evaluate_detection(
            lambda *inputs: detect(engine, *inputs),
            loader,
            shards,
            device=world.device,
            doing=watchdog.doing,
            what="validating",
            stop=stop,
        )

    return validation_by(config, config.train.validate_epochs, scores)
