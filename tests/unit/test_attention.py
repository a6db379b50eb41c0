"""The class token's attention, compared with the one that timm's own blocks compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mae_scale.cli import main
from mae_scale.data.bands import RGB
from mae_scale.data.transforms import decode_image, eval_crop
from mae_scale.inference.pictures import _LINE, _MARGIN
from mae_scale.models import build_classifier, build_mae
from mae_scale.models.attention import class_attention

NAME = "mae_vit_tiny_patch16"
WIDE = {"img_size": (32, 64), "patch_size": 8, "depth": 3}


@pytest.mark.parametrize("kind", ["mae", "classifier"])
def test_it_is_the_attention_of_timm(kind: str) -> None:
    torch.manual_seed(0)
    model: Any = (
        build_mae(NAME, **WIDE) if kind == "mae" else build_classifier(NAME, 5, **WIDE)
    ).eval()
    images = torch.randn(2, 3, 32, 64)
    seen = []
    block: Any = model.blocks[-1]
    block.attn.fused_attn = False
    block.attn.attn_drop.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model.features(images, "token") if kind == "mae" else model.features(images)
    found = class_attention(model, images)
    assert found.shape == (2, 3, 4, 8)
    torch.testing.assert_close(found.flatten(2), seen[0][:, :, 0, 1:])
    assert (found.sum(dim=(2, 3)) < 1).all()


def test_the_picture(
    imagenet_tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model = build_mae(NAME, **{**WIDE, "img_size": 32}, decoder_depth=1).eval()
    torch.nn.init.normal_(model.blocks[-1].attn.qkv.weight, std=0.5)  # it has favourite patches
    torch.save({"model": model.state_dict()}, tmp_path / "w.pth")
    photographs = sorted(imagenet_tree.rglob("*.JPEG"))[:3]
    out = tmp_path / "new folder" / "attention.png"
    command = ["attention", str(tmp_path / "w.pth"), *map(str, photographs), "--out", str(out)]
    command += ["--model", NAME]
    assert main([*command, "--most", "2"]) == 0
    with Image.open(out) as image:
        picture = np.asarray(image)
    side = 320 + 2 * _MARGIN  # pictures of 32 pixels are enlarged tenfold
    assert picture.shape == (_LINE + 2 * (side + _LINE), 5 * side, 3)
    first = eval_crop(decode_image(photographs[0].read_bytes()), 32, 0.875)
    top = _LINE + _MARGIN
    drawn = picture[top : top + 320, _MARGIN : _MARGIN + 320]
    assert np.array_equal(drawn[::10, ::10], first.permute(1, 2, 0).numpy())
    heads = class_attention(model, RGB.normalize(first[None]))[0]
    for number, shares in enumerate((heads.mean(dim=0), *heads)):
        left = (number + 1) * side + _MARGIN
        red = picture[top : top + 320, left : left + 320, 0].astype(float)
        patches = red.reshape(4, 80, 4, 80).mean(axis=(1, 3))
        order = np.corrcoef(patches.ravel(), shares.numpy().ravel())[0, 1]
        assert order > 0.6  # bright where the attention is
    for wrong, says in (
        (["--out", "x.jpg"], "must end in .png"),
        (["--most", "0"], "must be at least 1"),
        (["--img_size", "32x"], "is no size of images"),
        (["--img_size", "36"], "is no multiple of patch_size 8"),
        (["--ema"], "is no run folder"),
    ):
        assert main([*command, *wrong]) == 2
        assert says in capsys.readouterr().err
