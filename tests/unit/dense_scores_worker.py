"""One of the processes of test_dense_scores.py, which scores an invented segmenter and detector."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from mae_scale.data.annotated import DetectionEvalLoader, SegmentationEvalLoader
from mae_scale.data.annotations import shape_mask
from mae_scale.data.shards import open_shards
from mae_scale.train.detection_scores import evaluate_detection, ground_truth
from mae_scale.train.segmentation_scores import Sliding, evaluate_segmentation


def invented(truth: dict[str, Any], sample: int, height: int, width: int) -> dict[str, Any]:
    """Invent detections that follow from an image's number: its objects moved, and wrong ones."""
    generator = np.random.default_rng(sample)
    ids = sorted(category["id"] for category in truth["categories"])
    number = truth["images"][sample]["id"]
    boxes, classes, scores, masks = [], [], [], []
    for annotation in truth["annotations"]:
        if annotation["image_id"] != number:
            continue
        shift = int(generator.integers(0, 5))
        mask = np.roll(shape_mask(annotation["segmentation"], height, width), shift, axis=1)
        x, y, w, h = annotation["bbox"]
        boxes.append([x + shift, y, x + w + shift, y + h])
        masks.append(mask.astype(bool))
        classes.append(ids.index(annotation["category_id"]))
        scores.append(generator.random())
    for _ in range(3):
        masks.append(generator.random((height, width)) < 0.01)
        boxes.append([1.0, 2.0, 30.0, 40.0])
        classes.append(int(generator.integers(0, len(ids))))
        scores.append(generator.random())
    return {
        "boxes": torch.tensor(boxes), "classes": torch.tensor(classes),
        "scores": torch.tensor(scores), "masks": torch.from_numpy(np.stack(masks)),
    }  # fmt: skip


def pointwise_logits(images: torch.Tensor) -> torch.Tensor:
    """Give the logits of a segmenter without weights, which goes by five colours."""
    weights = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    return torch.einsum("bchw,kc->bkhw", images, weights)


def main(rank: int, world_size: int, meeting: Path, segments: Path, objects: Path) -> None:
    """Measure both on all processes; rank 0 writes beside the file at which they meet."""
    torch.set_num_threads(1)
    ranks = {"rank": rank, "world_size": world_size}
    dist.init_process_group("gloo", init_method=f"file://{meeting}", **ranks)
    shards = open_shards(segments)
    loader = SegmentationEvalLoader(shards, img_size=64, batch_size=1, **ranks)
    scores = evaluate_segmentation(
        pointwise_logits, loader, Sliding(64, 43), classes=5, device=torch.device("cpu")
    )
    assert scores is not None
    shards = open_shards(objects)
    truth = ground_truth(shards)
    by_size = {(i["height"], i["width"]): n for n, i in enumerate(truth["images"])}

    def detect(_: torch.Tensor, __: torch.Tensor, originals: torch.Tensor) -> list[Any]:
        sizes = [tuple(size) for size in originals.tolist()]  # each image has another one
        return [invented(truth, by_size[s], *s) if s in by_size else {} for s in sizes]

    detector = DetectionEvalLoader(shards, img_size=64, batch_size=2, **ranks)
    found = evaluate_detection(detect, detector, shards, device=torch.device("cpu"))
    if rank == 0:
        content = json.dumps([scores.row(), scores.confusion.tolist(), found])
        meeting.with_suffix(".json").write_text(content)
    dist.destroy_process_group()
