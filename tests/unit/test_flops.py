"""FLOPs counted on the meta device, and MFU from them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mae_scale.models import build_classifier, build_mae
from mae_scale.models.detector import build_detector
from mae_scale.models.segmenter import build_segmenter
from mae_scale.planning.flops import blank_images, count_flops
from mae_scale.planning.gpus import knows_bf16, mfu, peak_flops
from mae_scale.tasks import detect, finetune, linprobe, pretrain, segment


def counted_by_torch(model: Any, trial_loss: Any) -> float:
    """Count forward and backward pass of two images together; attention is single products."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        trial_loss(model, blank_images(model, 2)).backward()
    return counter.get_total_flops() / 2


@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"mask_ratio": 0.4, "depth": 3},
        {"mask_tokens_in_encoder": True},
        {"target": "tokens"},
        {"mask_sampling": "grid"},
        {"fewer_passes": True},
        {"in_chans": 5, "img_size": (32, 64)},
    ],
)
def test_pretraining(switches: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = build_mae("mae_vit_tiny_patch16", **{"depth": 2, **switches})
    assert count_flops(model, pretrain.trial_loss).training == counted_by_torch(
        model, pretrain.trial_loss
    )


@pytest.mark.parametrize("tune", [None, 2, 0.5, 0])
def test_a_classifier_with_frozen_blocks(tune: float | None) -> None:
    with torch.device("meta"):
        model = build_classifier("mae_vit_base_patch16", 1000, depth=4)
    if tune is not None:
        model.tune_last(tune)
    expected = counted_by_torch(model, finetune.trial_loss)
    # The first trained layer has no gradient of its input, which the rule counts as a whole.
    found = count_flops(model, finetune.trial_loss).training
    assert found == pytest.approx(expected, rel={None: 0, 2: 0.03, 0.5: 0.1, 0: 1e-3}[tune])


def test_a_probe() -> None:
    with torch.device("meta"):
        model = build_classifier("mae_vit_tiny_patch16", 10, head="probe", depth=2)
    model.tune_last(0)
    head = 2 * model.last_linear.weight.numel()
    assert count_flops(model, linprobe.trial_loss).training == head + counted_by_torch(
        model, linprobe.trial_loss
    )


@pytest.mark.parametrize(
    ("build", "task", "sizes"),
    [
        (build_detector, detect, {"img_size": 128, "depth": 4, "rois": 16}),
        (build_segmenter, segment, {"img_size": 64, "depth": 6}),
    ],
)
def test_detection_and_segmentation(build: Any, task: Any, sizes: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = build("mae_vit_tiny_patch16", 5, **sizes)
    found = count_flops(model, task.trial_loss)
    assert found.training == pytest.approx(counted_by_torch(model, task.trial_loss), rel=0.02)
    model.set_activation_checkpointing(2)
    assert found.again(model) == sum(flops for number, flops in found.blocks if number % 2 == 0) > 0


def test_published_counts() -> None:
    """ViT-H takes 97.1 GFLOP forward and ViT-L 41.5, as the recipes say; mask tokens in the encoder
    cost 3.3 times as much by the paper (Table 1c), and 3.23 times by our count."""
    counts = {}
    for name, switch in (
        ("large_patch16", False),
        ("huge_patch14", False),
        ("large_patch16", True),
    ):
        with torch.device("meta"):
            model = build_mae(f"mae_vit_{name}", mask_tokens_in_encoder=switch)
        counts[name, switch] = count_flops(model, pretrain.trial_loss).training / 3
    large = counts["large_patch16", False]
    assert large == pytest.approx(41.5e9, rel=3e-3)
    assert counts["huge_patch14", False] == pytest.approx(97.1e9, rel=3e-3)
    assert counts["large_patch16", True] / large == pytest.approx(3.3, abs=0.1)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA B200", 2250),
        ("NVIDIA L40S", 362.1),
        ("NVIDIA A10", 125),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A10G", None),
        ("Tesla V100-SXM2-32GB", None),
        ("Quadro", None),
    ],
)
def test_peak_of_a_gpu_by_its_name(name: str, tflops: float | None) -> None:
    assert peak_flops(name) == (tflops and pytest.approx(tflops * 1e12))
    assert knows_bf16(name) == ("V100" not in name)


def test_mfu(monkeypatch: pytest.MonkeyPatch) -> None:
    """MFU is the observed images per second over those that the peak would allow (PaLM, appendix
    B)."""
    assert mfu(1e9, 100, torch.device("cpu")) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert mfu(124.2e9, 4000, torch.device("cuda", 0)) == pytest.approx(0.502, abs=1e-3)
