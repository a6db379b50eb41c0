"""Scores of detection and segmentation: by the libraries, at several world sizes."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_scores_worker import invented, main, pointwise_logits
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from test_annotated import ade, ade_shards, coco, coco_shards  # noqa: F401

from mae_scale.data.annotated import SegmentationEvalLoader
from mae_scale.data.annotations import IGNORE
from mae_scale.data.shards import open_shards
from mae_scale.train.detection_scores import (
    as_coco,
    average_precision,
    ground_truth,
    library,
)
from mae_scale.train.segmentation_scores import (
    SegmentationScores,
    Sliding,
    predict_classes,
)


def test_truth_from_shards_gives_the_official_numbers(
    coco: Path,  # noqa: F811
    coco_shards: Path,  # noqa: F811
) -> None:
    shards = open_shards(coco_shards)
    truth = ground_truth(shards)
    ids = sorted(category["id"] for category in truth["categories"])
    detections = []
    for sample, image in enumerate(truth["images"]):
        found = invented(truth, sample, image["height"], image["width"])
        detections += as_coco(found, image["id"], ids)
    official = COCO(str(coco / "annotations/instances_train2017.json"))
    ours = average_precision(truth, detections, library("pycocotools"))
    assert 5 < ours["box_ap"] < 95 and 5 < ours["mask_ap"] < 95
    for kind, name in (("bbox", "box"), ("segm", "mask")):
        # As in Detectron2, for masks the area of a detection is that of its mask, not of its box.
        own = {"bbox": "bbox", "segm": "segmentation"}[kind]
        keys = ("image_id", "category_id", "score", own)
        results = official.loadRes([{key: found[key] for key in keys} for found in detections])
        evaluation = COCOeval(official, results, kind)
        evaluation.evaluate(), evaluation.accumulate(), evaluation.summarize()
        expected = [100 * value for value in evaluation.stats[:6]]
        assert expected == pytest.approx([v for k, v in ours.items() if k.startswith(name)])
    faster = average_precision(truth, detections, library("faster-coco-eval"))
    assert faster == pytest.approx(ours, abs=1e-9)
    assert average_precision(truth, [])["box_ap"] == 0


def test_counts_give_what_mmsegmentation_defines() -> None:
    # Class 2 occurs nowhere; class 3 is predicted but occurs in no label.
    confusion = torch.tensor([[6, 2, 0, 0], [1, 3, 0, 4], [0, 0, 0, 0], [0, 0, 0, 0]])
    row = SegmentationScores(confusion, 2).row()
    assert row["miou"] == pytest.approx(100 * (6 / 9 + 3 / 10 + 0) / 3)
    assert row["macc"] == pytest.approx(100 * (6 / 8 + 3 / 8) / 2)
    assert row["aacc"] == pytest.approx(100 * 9 / 16)


def test_flip_and_scales_of_a_pointwise_model_change_little() -> None:
    image = (torch.rand(3, 8, 11) * 255).to(torch.uint8).repeat_interleave(8, 1)
    image = image.repeat_interleave(8, 2)
    plain = predict_classes(pointwise_logits, image, Sliding(64, 43))
    many = predict_classes(pointwise_logits, image, Sliding(64, 43, (0.5, 1.0, 1.5), True))
    assert plain.shape == (64, 88) and (plain == many).float().mean() > 0.9
    assert torch.equal(
        plain.flip(-1), predict_classes(pointwise_logits, image.flip(-1), Sliding(64, 43))
    )


@pytest.mark.slow
def test_scores_are_the_same_at_any_world_size(
    ade_shards: Path,  # noqa: F811
    coco_shards: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    # A server imports torch once and forks the processes of all three world sizes.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mae_scale.train.detection_scores"])
    results = []
    for world_size in (1, 2, 3):
        meeting = tmp_path / str(world_size)
        processes = [
            context.Process(target=main, args=(rank, world_size, meeting, ade_shards, coco_shards))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0] * world_size
        results.append(json.loads(meeting.with_suffix(".json").read_text()))
    assert results[0] == results[1] == results[2]
    row, confusion, detection = results[0]
    assert row["images"] == 6 and detection["images"] == 12 and detection["box_ap"] > 5
    shards = open_shards(ade_shards)
    labelled = sum(
        int((batch["segmentation"] != IGNORE).sum())
        for batch in SegmentationEvalLoader(shards, img_size=64, batch_size=1)
    )
    assert int(np.sum(confusion)) == labelled
