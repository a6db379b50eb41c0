"""UperNet, compared with modules of transformers; its loss, windows and layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import BeitConfig
from transformers.models.beit.modeling_beit import BeitFCNHead, BeitFPNNeck, BeitUperHead

from mae_scale.errors import UserError
from mae_scale.models.norms import NORMS
from mae_scale.models.pyramid import FourScales
from mae_scale.models.segmenter import (
    AuxiliaryHead,
    Segmenter,
    UperHead,
    build_segmenter,
    default_blocks,
    pixel_loss,
    sliding_logits,
    window_starts,
)


def _copy(own: nn.Module, oracle: nn.Module, names: dict[str, str]) -> None:
    """Give the oracle and our module the same random weights; `names` maps prefixes of keys."""
    state = oracle.state_dict()
    mapped = {}
    for key, value in state.items():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) * (0.5 if "running_var" in key else 0.2) + 0.05)
            if value.ndim > 1:
                value.sub_(0.15)
        for start, mine in sorted(names.items(), key=lambda pair: -len(pair[0])):
            if key.startswith(start):
                rest = key.removeprefix(start)
                rest = rest.replace("convolution.", "0.").replace("normalization.", "1.")
                mapped[mine + rest.replace("conv.", "1.") if "conv." in rest else mine + rest] = (
                    value
                )
                break
        else:
            raise AssertionError(key)
    own.load_state_dict(mapped)


@pytest.mark.parametrize(("width", "classes", "training"), [(32, 7, False), (48, 150, True)])
def test_heads_and_neck_as_transformers(width: int, classes: int, training: bool) -> None:
    torch.manual_seed(0)
    config = BeitConfig(hidden_size=width, num_attention_heads=4, auxiliary_channels=16)
    config.num_labels = classes
    features = [torch.randn(2, width, 8, 8) for _ in range(4)]
    oracle_neck, neck = BeitFPNNeck(config), FourScales(width, NORMS["batch"])
    _copy(
        neck,
        oracle_neck,
        {
            "fpn1.conv_transpose1.": "scales.0.0.",
            "fpn1.normalization.": "scales.0.1.",
            "fpn1.conv_transpose2.": "scales.0.3.",
            "fpn2.": "scales.1.",
        },
    )
    neck.train(training), oracle_neck.train(training)
    maps = neck(features)
    for own, other in zip(maps, oracle_neck(tuple(features)), strict=True):
        assert (own - other).abs().max() <= 1e-5

    head, oracle = UperHead(width, width, classes, dropout=0.0), BeitUperHead(config)
    _copy(
        head,
        oracle,
        {
            "psp_modules.blocks.": "pools.",
            "psp_bottleneck.": "pooled.",
            "lateral_convs.": "laterals.",
            "fpn_convs.": "outputs.",
            "fpn_bottleneck.": "joined.",
            "classifier.": "classifier.",
        },
    )
    head.train(training), oracle.train(training)
    expected = oracle(maps)
    assert (head(maps) - expected).abs().max() <= 1e-5 * max(1, float(expected.abs().max()))

    auxiliary, oracle_auxiliary = AuxiliaryHead(width, 16, classes, 0.0), BeitFCNHead(config)
    if not config.auxiliary_concat_input:
        _copy(auxiliary, oracle_auxiliary, {"convs.0.": "0.", "classifier.": "2."})
        auxiliary.train(training), oracle_auxiliary.train(training)
        expected = oracle_auxiliary(maps)
        assert (auxiliary(maps[2]) - expected).abs().max() <= 1e-5


def test_parameter_counts() -> None:
    with torch.device("meta"):
        base = build_segmenter("mae_vit_base_patch16", 150, layer_scale=1.0)
        large = build_segmenter("mae_vit_large_patch16", 150, channels=1024)

    def millions(module: nn.Module) -> float:
        return round(sum(p.numel() for p in module.parameters()) / 1e6, 2)

    counts = [millions(part) for part in (base.neck, base.head, base.auxiliary)]
    assert counts == [7.08, 67.96, 1.81]
    counts = [millions(part) for part in (large.neck, large.head, large.auxiliary)]
    assert counts == [12.59, 120.76, 2.40]
    assert 162 < millions(base) < 165


def test_loss_is_averaged_over_all_pixels() -> None:
    logits, labels = torch.randn(2, 5, 4, 4), torch.randint(0, 5, (2, 16, 16))
    labels[:, :, :8] = 255
    full = F.interpolate(logits, (16, 16), mode="bilinear")
    over_labelled = F.cross_entropy(full, labels, ignore_index=255)
    assert torch.allclose(pixel_loss(logits, labels), over_labelled / 2)
    assert pixel_loss(logits, torch.full_like(labels, 255)) == 0


def test_windows_cover_the_image_and_end_with_it() -> None:
    assert window_starts(512, 512, 341) == [0]
    assert window_starts(683, 512, 341) == [0, 171]
    assert window_starts(1100, 512, 341) == [0, 341, 588]
    images = torch.randn(1, 3, 20, 33)
    # Windows that give back their input are averaged to the image.
    assert torch.allclose(sliding_logits(lambda x: x, images, 16, 11), images, atol=1e-6)
    assert sliding_logits(lambda x: x, images[..., :10, :], 16, 11).shape == (1, 3, 10, 33)


def test_layers_and_defaults() -> None:
    assert default_blocks(12) == (3, 5, 7, 11) and default_blocks(24) == (7, 11, 15, 23)
    model = Segmenter(
        num_classes=3, img_size=32, patch_size=8, embed_dim=32, depth=6, num_heads=2, channels=16,
        auxiliary_channels=8,
    )  # fmt: skip
    layers = {name: model.layer_of(name) for name, _ in model.named_parameters()}
    assert layers["backbone.cls_token"] == layers["backbone.pos_embed"] == 0
    assert layers["backbone.blocks.2.attn.rel_pos.table"] == 3
    assert layers["neck.scales.0.0.weight"] == layers["head.classifier.weight"] == 7
    images, labels = torch.randn(2, 3, 32, 32), torch.randint(0, 3, (2, 32, 32))
    model(images, labels).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.eval()(images).shape == (2, 3, 32, 32)
    with pytest.raises(UserError, match="4 blocks"):
        Segmenter(num_classes=3, out_blocks=(1, 2))
    with pytest.raises(UserError, match="no multiple of 6"):
        default_blocks(8)
