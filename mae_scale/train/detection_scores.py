"""COCO's average precision of a detector: exact, each image once, the same at any world size."""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from pycocotools import mask as rle

from mae_scale.config.sizes import sides
from mae_scale.data.annotated import DetectionEvalLoader
from mae_scale.data.annotations import read_records, shape_mask
from mae_scale.data.cache import ShardCache
from mae_scale.data.shards import ShardSet
from mae_scale.errors import UserError
from mae_scale.launch.distributed import gather_to_all, on_rank0
from mae_scale.train.validation import Stopped, batches_in_step, filled

SCORES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")  # COCO's first six numbers
Found = dict[str, torch.Tensor]
Library = tuple[type, type]  # the classes COCO and COCOeval


def ground_truth(shards: ShardSet, cache: ShardCache | None = None) -> dict[str, Any]:
    """Rebuild from the shards the part of COCO's annotation file that its evaluation needs.

    An annotation without `iscrowd` is no crowd; one without `area` gets the area of its mask.

    Raises:
        UserError: these are no shards of COCO, or a file in them is damaged.
    """
    records = read_records(shards, cache)
    return {
        "images": [record["image"] for record in records],
        "annotations": [_complete(a, r) for r in records for a in r["annotations"]],
        "categories": list(shards.categories),
    }


def _complete(annotation: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    if "area" not in annotation:
        mask = shape_mask(annotation["segmentation"], record["height"], record["width"])
        annotation = {**annotation, "area": int(mask.sum())}
    return {"iscrowd": 0, **annotation}


def library(name: str = "auto") -> Library:
    """Import COCO and COCOeval from pycocotools or faster-coco-eval; both compute the same numbers.

    Args:
        name: "pycocotools", "faster-coco-eval", or "auto": faster-coco-eval if it is installed.

    Raises:
        UserError: faster-coco-eval was asked for and is not installed.
    """
    if name != "pycocotools":
        try:
            faster = importlib.import_module("faster_coco_eval")
            return faster.COCO, faster.COCOeval_faster
        except ImportError:
            if name != "auto":
                raise UserError(
                    "faster-coco-eval is not installed: pip install 'mae-scale[coco]'"
                ) from None
    coco = importlib.import_module("pycocotools.coco").COCO
    return coco, importlib.import_module("pycocotools.cocoeval").COCOeval


def average_precision(
    truth: dict[str, Any], detections: Sequence[dict[str, Any]], of: Library | None = None
) -> dict[str, float]:
    """Compute COCO's numbers for boxes and masks, in percent; -100 for a size that no object has.

    Args:
        truth: images, annotations and categories, as in COCO's annotation file.
        detections: detections in COCO's format of results: image_id, category_id, bbox (x, y,
            width, height in pixels), score, and segmentation (run lengths as text).
        of: classes as returned by `library`; None: those of the faster library that is installed.

    Returns:
        "box_ap", "box_ap50", … for boxes and "mask_ap", … for masks, with the names in `SCORES`.
    """
    make_coco, make_evaluation = of or library()
    found: dict[str, float] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        coco = make_coco()
        coco.dataset = truth
        coco.createIndex()
        # This order does not depend on which rank found what.
        order = sorted(range(len(detections)), key=lambda i: detections[i]["image_id"])
        for kind, name in (("bbox", "box"), ("segm", "mask")):
            if not detections:
                found |= {f"{name}_{score}": 0.0 for score in SCORES}
                continue
            fields = ("image_id", "category_id", "score", *_FIELDS[kind])
            results = coco.loadRes([{key: detections[i][key] for key in fields} for i in order])
            evaluation = make_evaluation(coco, results, kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            values = [100 * float(value) for value in evaluation.stats[: len(SCORES)]]
            found |= {f"{name}_{s}": v for s, v in zip(SCORES, values, strict=True)}
    return found


_FIELDS = {"bbox": ("bbox",), "segm": ("segmentation",)}


def as_coco(found: Found, image_id: int, category_ids: Sequence[int]) -> list[dict[str, Any]]:
    """Convert the detections of one image into COCO's format of results.

    Args:
        found: "boxes" float [n, 4], x0, y0, x1, y1 in pixels of the image as it is in the file;
            "classes" int64 [n] from 0; "scores" float [n]; "masks" bool [n, H, W].
        image_id: COCO's id of the image.
        category_ids: COCO's id of each class.
    """
    boxes = found["boxes"].double().cpu().numpy()
    boxes = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    classes, scores = found["classes"].tolist(), found["scores"].tolist()
    result = []
    for i, mask in enumerate(found["masks"].cpu().numpy()):
        packed = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
        result.append(
            {
                "image_id": image_id,
                "category_id": category_ids[classes[i]],
                "bbox": boxes[i].tolist(),
                "score": scores[i],
                "segmentation": {"size": packed["size"], "counts": packed["counts"].decode()},
            }
        )
    return result


@torch.no_grad()
def evaluate_detection(
    detect: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], list[Found]],
    loader: DetectionEvalLoader,
    shards: ShardSet,
    *,
    device: torch.device,
    doing: Callable[[str], None] = lambda what: None,
    what: str = "evaluating",
    stop: Callable[[], bool] = lambda: False,
    cache: ShardCache | None = None,
) -> dict[str, float] | None:
    """Compute COCO's numbers over each image once; all ranks call, and get the same numbers.

    Every rank runs the same number of batches, all of the same size; black images fill them up.

    Args:
        detect: function of images uint8 [b, 3, S, S], their heights and widths without padding
            int64 [b, 2], and those in the file int64 [b, 2], all on the device. It returns, for
            each image, the detections that `as_coco` takes.
        loader: loader of this rank's part of the data set.
        shards: shards of the data set.
        device: device of this rank.
        doing: called with a description of what this rank does, as `Watchdog.doing` is.
        what: name of the work in that description.
        stop: asked before each batch; if it returns True on any rank, all ranks give up.
        cache: cache of remote shards.

    Returns:
        "images", the number of images, and "box_ap", …, "mask_ap", … in percent; None if the
        evaluation was stopped.

    Raises:
        RunError: an image is damaged, or a shard cannot be read.
    """
    ids = [category["id"] for category in sorted(shards.categories, key=lambda c: c["id"])]
    packed: list[tuple[int, list[dict[str, Any]]]] = []
    side = sides(loader.img_size)[0]
    try:
        for batch in batches_in_step(loader, doing=doing, what=what, stop=stop):
            images, sizes = filled(batch, loader), torch.full((loader.batch_size, 2), side)
            originals = sizes.clone()
            samples = [] if batch is None else batch["sample"].tolist()
            if batch is not None:
                sizes[: len(samples)] = batch["size"]
                originals[: len(samples)] = batch["original"]
            found = detect(images.to(device), sizes.to(device), originals.to(device))
            for sample, each in zip(samples, found, strict=False):
                packed.append((sample, as_coco(each, 0, ids)))
    except Stopped:
        return None
    doing(f"{what}, comparing with the annotations")
    everything = sorted(
        (pair for part in gather_to_all(packed) for pair in part), key=lambda pair: pair[0]
    )
    return on_rank0(lambda: _compare(shards, cache, everything))


def _compare(
    shards: ShardSet,
    cache: ShardCache | None,
    found: list[tuple[int, list[dict[str, Any]]]],
) -> dict[str, float]:
    truth = ground_truth(shards, cache)
    detections = [
        {**each, "image_id": truth["images"][sample]["id"]}
        for sample, of_image in found
        for each in of_image
    ]
    return {"images": len(truth["images"]), **average_precision(truth, detections)}
