"""FLOPs by formula compared with PyTorch's own counter, and MFU from them."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mae_scale.models import MODELS, build_mae
from mae_scale.planning.flops import forward_flops, training_flops
from mae_scale.planning.gpus import mfu, peak_flops


@pytest.mark.slow
@pytest.mark.parametrize("mask_ratio", [0.75, 0.4])
@pytest.mark.parametrize("name", MODELS)
def test_formula_equals_pytorchs_counter(name: str, mask_ratio: float) -> None:
    """On the meta device attention consists of single products, so that the counter sees them."""
    with torch.device("meta"):
        model = build_mae(name, mask_ratio=mask_ratio)
        images, noise = torch.empty(1, 3, 224, 224), torch.empty(1, model.num_patches)
    with FlopCounterMode(display=False) as forward:
        loss, _, _ = model(images, noise)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    assert forward_flops(model) == forward.get_total_flops()
    assert training_flops(model) == forward.get_total_flops() + backward.get_total_flops()


@pytest.mark.parametrize(
    "switches",
    [
        {"mask_tokens_in_encoder": True},
        {"target": "tokens"},
        {"mask_sampling": "grid"},
        {"fewer_passes": True},
        {"fewer_passes": True, "mask_tokens_in_encoder": True},
    ],
)
def test_formula_of_the_switches(switches: dict) -> None:
    with torch.device("meta"):
        model = build_mae("mae_vit_base_patch16", **switches)
        images, noise = torch.empty(1, 3, 224, 224), torch.empty(1, 196)
        ids = torch.empty(1, 196, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(images, noise, token_ids=ids)
    assert forward_flops(model) == counter.get_total_flops()


def test_mask_tokens_in_the_encoder_cost_what_the_paper_says() -> None:
    """ViT-L takes 3.3 times the operations by the paper (Table 1c), and 3.23 times by our count."""
    with torch.device("meta"):
        without, with_tokens = (
            build_mae("mae_vit_large_patch16", mask_tokens_in_encoder=switch)
            for switch in (False, True)
        )
    ratio = forward_flops(with_tokens) / forward_flops(without)
    assert ratio == pytest.approx(3.3, abs=0.1)


def test_fused_attention_counts_the_same() -> None:
    model = build_mae("mae_vit_tiny_patch16", img_size=64, patch_size=8)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.rand(1, 3, 64, 64), torch.rand(1, model.num_patches))
    assert any("scaled_dot_product" in str(op) for op in counter.get_flop_counts()["Global"])
    assert forward_flops(model) == counter.get_total_flops()


def test_huge_takes_the_published_multiple_of_large() -> None:
    """ViT-H takes 97.1 GFLOP and ViT-L 41.5, as the recipes say."""
    with torch.device("meta"):
        large, huge = (build_mae(f"mae_vit_{n}") for n in ("large_patch16", "huge_patch14"))
    assert forward_flops(large) == pytest.approx(41.5e9, rel=1e-3)
    assert forward_flops(huge) == pytest.approx(97.1e9, rel=1e-3)


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


def test_mfu(monkeypatch: pytest.MonkeyPatch) -> None:
    """MFU is the observed images per second over those that the peak would allow (PaLM, appendix
    B)."""
    assert mfu(1e9, 100, torch.device("cpu")) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert mfu(124.2e9, 4000, torch.device("cuda", 0)) == pytest.approx(0.502, abs=1e-3)
