"""Mask R-CNN, compared with torchvision's own parts, the published sizes, and Detectron2."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch.nn import functional as F
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign

from mae_scale.config.detect import DetectAugmentConfig, DetectConfig
from mae_scale.config.sections import DataConfig
from mae_scale.data.transforms import normalize
from mae_scale.errors import UserError
from mae_scale.models.detector import Detector, build_detector
from mae_scale.models.proposals import (
    DETECTRON2,
    TORCHVISION,
    ProposalNetwork,
    RoIPool,
    mask_loss,
    paste_masks,
)
from mae_scale.tasks.detect import detect

LI = {"pyramid": "fpn", "norm": "batch", "relative": "shared", "positions": "fixed", "window": 16}
VITDET = {"pos_grid": 14}
SMALL = {
    "img_size": 128,
    "embed_dim": 32,
    "depth": 4,
    "num_heads": 2,
    "channels": 16,
    "hidden": 32,
    "rois": 16,
    "proposals": 50,
}
SMALL_LI = {**SMALL, **LI, "window": 4}
SMALL_VITDET = {**SMALL, "window": 3, "pos_grid": 4}


def targets() -> list[dict[str, torch.Tensor]]:
    """Give the targets of an image with two objects and of an image with none."""
    boxes = torch.tensor([[10.0, 20.0, 60.0, 90.0], [50.5, 40.0, 120.0, 100.0]])
    masks = torch.zeros(2, 128, 128, dtype=torch.bool)
    masks[0, 20:90, 10:60] = True
    masks[1, 40:100, 51:120:2] = True
    return [
        {"boxes": boxes, "classes": torch.tensor([2, 0]), "masks": masks},
        {
            "boxes": torch.zeros(0, 4),
            "classes": torch.zeros(0, dtype=torch.int64),
            "masks": torch.zeros(0, 128, 128, dtype=torch.bool),
        },
    ]


SIZES = torch.tensor([[128, 128], [100, 128]])


def detector(sizes: dict[str, Any], **more: Any) -> Detector:
    torch.manual_seed(0)
    return Detector(num_classes=5, **{**sizes, **more})


def test_sizes_are_the_published_ones() -> None:
    with torch.device("meta"):
        li = build_detector("mae_vit_base_patch16", 80, **LI)
        vitdet = build_detector("mae_vit_base_patch16", 80, **VITDET)
    assert sum(p.numel() for p in li.parameters()) == 118_678_541
    assert sum(p.numel() for p in li.parameters() if p.requires_grad) == 115_532_813
    assert round(sum(p.numel() for p in vitdet.parameters()) / 1e6, 2) == 110.90


def randomised(module: torch.nn.Module) -> None:
    """Give the model weights with which it detects something."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_with_torchvisions_switches_it_is_torchvision(training: bool, norm: str) -> None:
    ours = detector(SMALL, norm=norm, conventions=TORCHVISION, window=0)
    randomised(ours.rpn)
    randomised(ours.roi_heads)
    ours.train(training)
    rpn = RegionProposalNetwork(
        AnchorGenerator(((32,), (64,), (128,), (256,), (512,)), ((0.5, 1.0, 2.0),) * 5),
        RPNHead(16, 3, conv_depth=2),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n={"training": 100, "testing": 50},
        post_nms_top_n={"training": 50, "testing": 50},
        nms_thresh=0.7,
    )
    rpn.load_state_dict(ours.rpn.state_dict())
    levels = ["0", "1", "2", "3"]
    heads = RoIHeads(
        MultiScaleRoIAlign(levels, 7, 2),
        ours.roi_heads.box_head,
        ours.roi_heads.box_predictor,
        *(0.5, 0.5, 16, 0.25, None, 0.05, 0.5, 100),
        mask_roi_pool=MultiScaleRoIAlign(levels, 14, 2),
        mask_head=ours.roi_heads.mask_head,
        mask_predictor=ours.roi_heads.mask_predictor,
    )
    rpn.train(training), heads.train(training)
    images = torch.randn(2, 3, 128, 128)
    maps = [torch.randn(2, 16, 32 >> i, 32 >> i) for i in range(4)]
    maps.append(maps[-1][:, :, ::2, ::2])
    by_name = {str(i): x for i, x in enumerate(maps)}
    shapes = [(128, 128), (100, 128)]
    theirs_targets = [
        {"boxes": t["boxes"], "labels": t["classes"] + 1, "masks": t["masks"].to(torch.uint8)}
        for t in targets()
    ]
    results = []
    for first, second in ((ours.rpn, ours.roi_heads), (rpn, heads)):
        torch.manual_seed(3)
        wanted = theirs_targets if training else None
        boxes, losses = first(ImageList(images, shapes), by_name, wanted)
        found, more = second(by_name if second is heads else maps, boxes, shapes, wanted)
        results.append((boxes, losses | more, found))
    (boxes, losses, found), (their_boxes, their_losses, their_found) = results
    for a, b in zip(boxes, their_boxes, strict=True):
        assert torch.equal(a, b)
    assert losses.keys() == their_losses.keys() and len(losses) == (5 if training else 0)
    for name, value in losses.items():
        assert abs(value - their_losses[name]) <= 1e-5, name
    assert len(found) == len(their_found)
    for mine, other in zip(found, their_found, strict=True):
        assert len(mine["boxes"]) > 0
        for key, value in mine.items():
            assert (value - other[key]).abs().max() <= 1e-5, key


@pytest.mark.parametrize("sizes", [SMALL_LI, SMALL_VITDET])
def test_all_that_is_trained_gets_a_gradient_even_without_objects(sizes: dict[str, Any]) -> None:
    model = detector(sizes).train()
    empty = [targets()[1], targets()[1]]
    for wanted in (targets(), empty):
        model.zero_grad()
        losses = model(torch.randn(2, 3, 128, 128), SIZES, wanted)
        assert all(torch.isfinite(loss) for loss in losses.values())
        sum(losses.values()).backward()
        lacking = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert lacking == []


def test_boxes_stay_fp32_where_the_rest_is_bf16() -> None:
    model = detector(SMALL_VITDET).train()
    images = torch.randn(2, 3, 128, 128)
    seen: list[torch.Tensor] = []
    model.roi_heads.box_roi_pool.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[1]))
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(images, SIZES, targets())
        model.eval()
        found = model(images, SIZES)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    assert {boxes.dtype for boxes in seen} == {torch.float32}
    assert {each["boxes"].dtype for each in found} == {torch.float32}
    # Boxes of the targets, which are proposals, too, are not rounded to the 3 digits of bf16.
    assert any((boxes == targets()[0]["boxes"][1]).all(dim=1).any() for boxes in seen)
    anchors = model.rpn.anchor_generator(
        ImageList(images, [(128, 128)]), [torch.zeros(1, 1, 32, 32, dtype=torch.bfloat16)] * 5
    )[0]
    assert anchors.dtype == torch.float32


def test_losses_of_proposals_are_divided_by_the_anchors_asked_for() -> None:
    rpn = ProposalNetwork(4, [32], samples=8, conventions=DETECTRON2)
    labels = [torch.tensor([1.0, 0.0, -1.0]), torch.tensor([0.0, -1.0, -1.0])]
    logits = torch.tensor([0.5, -1.0, 3.0, 2.0, 0.0, 0.0])[:, None]
    deltas, wanted = torch.zeros(6, 4), [torch.full((3, 4), 0.25)] * 2
    objectness, boxes = rpn.compute_loss(logits, deltas, labels, wanted)
    expected = F.softplus(torch.tensor(-0.5)) + F.softplus(torch.tensor(-1.0))
    expected = expected + F.softplus(torch.tensor(2.0))
    assert objectness == pytest.approx(float(expected) / 16)
    assert boxes == pytest.approx(4 * 0.25 / 16)  # L1 of one positive


def test_pooling_reads_a_ramp_exactly() -> None:
    ramp = (torch.arange(64) + 0.5).expand(1, 1, 64, 64) * 4  # x in pixels, at stride 4
    maps = [ramp, *(torch.zeros(1, 1, 64 >> i, 64 >> i) for i in range(1, 4))]
    pool = RoIPool(7, [4, 8, 16, 32], DETECTRON2)
    found = pool(maps, [torch.tensor([[21.0, 30.0, 91.0, 100.0]])])
    expected = 21 + (torch.arange(7) + 0.5) * 10
    assert (found[0, 0] - expected).abs().max() <= 1e-4


def test_a_pasted_mask_lies_where_its_box_lies() -> None:
    half = torch.zeros(28, 28)
    half[:, :14] = 1
    boxes = torch.tensor([[10.0, 20.0, 38.0, 48.0], [-7.0, 50.0, 7.0, 78.0], [5.0, 5.0, 5.0, 9.0]])
    found = paste_masks(torch.stack([half, torch.ones(28, 28), half]), boxes, (64, 60))
    expected = torch.zeros(3, 64, 60, dtype=torch.bool)
    expected[0, 20:48, 10:24] = True
    expected[1, 50:64, 0:7] = True
    assert torch.equal(found, expected)
    assert paste_masks(torch.zeros(0, 28, 28), torch.zeros(0, 4), (8, 9)).shape == (0, 8, 9)


def test_masks_without_a_box_cost_nothing() -> None:
    logits = torch.zeros(0, 3, 28, 28, requires_grad=True)
    loss = mask_loss(logits, torch.zeros(0, dtype=torch.int64), torch.zeros(0, 28, 28))
    assert loss == 0


def test_initial_weights_are_those_of_detectron2() -> None:
    torch.manual_seed(0)
    model = build_detector("mae_vit_tiny_patch16", 80, img_size=64, **{**LI, "window": 2}, depth=4)
    heads = model.roi_heads

    def std(module: torch.nn.Module) -> float:
        return float(module.weight.std())

    assert std(model.rpn.head.conv[0][0]) == pytest.approx(0.01, rel=0.05)
    assert std(heads.box_predictor.cls_score) == pytest.approx(0.01, rel=0.05)
    assert std(heads.box_predictor.bbox_pred) == pytest.approx(0.001, rel=0.05)
    assert std(heads.mask_predictor.mask_fcn_logits) == pytest.approx(0.001, rel=0.05)
    fan_out = 256 * 9
    assert std(heads.box_head[0][0]) == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
    fc = heads.box_head[5]
    assert float(fc.weight.abs().max()) == pytest.approx((3 / fc.in_features) ** 0.5, rel=0.01)
    assert float(fc.bias.abs().max()) == 0
    assert float(model.backbone.rel_pos_global.table.abs().max()) == 0


def test_layers_for_decay() -> None:
    model = detector(SMALL_VITDET)
    numbers = {name: model.layer_of(name) for name, _ in model.named_parameters()}
    assert numbers["backbone.pos_embed"] == numbers["backbone.patch_embed.proj.weight"] == 0
    assert numbers["backbone.blocks.0.attn.rel_pos_h"] == 1
    assert numbers["backbone.blocks.3.norm1.weight"] == 4
    rest = {n for name, n in numbers.items() if not name.startswith("backbone.")}
    assert rest == {5}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"patch_size": 14, "img_size": 112}, "power of 2"),
        ({"img_size": 144}, "multiple of 32"),
        ({"depth": 6}, "multiple of 4"),
        ({"num_classes": 0}, "at least 1 category"),
        ({"pyramid": "fpn", "embed_dim": 48}, "32 divides"),
    ],
)
def test_what_cannot_be_is_said(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Detector(**{"num_classes": 5, **SMALL, **wrong})


@pytest.mark.parametrize("recipe", ["vitdet", "li2021"])
def test_padding_is_shown_as_in_training(recipe: Literal["vitdet", "li2021"]) -> None:
    """li2021 pads with grey as a part of the image, vitdet with the mean colour outside of it."""
    seen: dict[str, torch.Tensor] = {}

    def model(images: torch.Tensor, sizes: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        seen.update(images=images, sizes=sizes)
        boxes = torch.tensor(
            [[0.0, 0.0, 32.0, 16.0], [0.0, 40.0, 10.0, 60.0]]
        )  # one in the padding
        return [
            {"boxes": boxes, "classes": torch.tensor([0, 1]), "scores": torch.tensor([0.9, 0.8]),
             "masks": torch.ones(2, 1, 28, 28)}
        ]  # fmt: skip

    config = DetectConfig(
        run_dir="run", data=DataConfig(train="shards"), augment=DetectAugmentConfig(recipe=recipe)
    )
    image = torch.full((1, 3, 64, 64), 128, dtype=torch.uint8)
    image[..., :32, :] = 200  # the image has half the height of the square
    (found,) = detect(model, config, image, torch.tensor([[32, 64]]), torch.tensor([[100, 200]]))
    shown = [64, 64] if recipe == "li2021" else [32, 64]
    assert seen["sizes"].tolist() == [shown]
    padding, grey = seen["images"][..., 32:, :], normalize(image)[..., 32:, :]
    assert torch.equal(padding, grey if recipe == "li2021" else torch.zeros_like(grey))
    assert found["boxes"].tolist() == [[0, 0, 100, 50]] and found["classes"].tolist() == [0]
    assert found["masks"].shape == (1, 100, 200)
    # The corners of a box lie at the border of the mask, so they are left out.
    assert found["masks"][0, 2:48, 2:98].all() and not found["masks"][0, 50:].any()
