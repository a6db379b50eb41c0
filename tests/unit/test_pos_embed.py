"""Position embeddings, compared with formulas written out here."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import ViTMAEConfig
from transformers.models.vit_mae.modeling_vit_mae import ViTMAEEmbeddings

from mae_scale.models import build_mae
from mae_scale.models.pos_embed import interpolate_pos_embed, sincos_pos_embed


@pytest.mark.parametrize(("width", "grid"), [(768, 14), (1280, 16), (512, 14), (12, 3), (4, 1)])
def test_sincos_formula(width: int, grid: int):
    table = sincos_pos_embed(width, grid)
    assert table.shape == (1, 1 + grid * grid, width) and table.dtype == torch.float32
    assert (table[0, 0] == 0).all()
    quarter = width // 4
    for row, column in {(0, 0), (0, grid - 1), (grid - 1, 0), (grid // 2, grid // 3)}:
        got = table[0, 1 + row * grid + column].tolist()
        frequencies = [10000 ** (-k / quarter) for k in range(quarter)]
        expected = (
            [math.sin(column * f) for f in frequencies]
            + [math.cos(column * f) for f in frequencies]
            + [math.sin(row * f) for f in frequencies]
            + [math.cos(row * f) for f in frequencies]
        )
        assert got == pytest.approx(expected, abs=1e-7)


def test_sincos_agrees_with_transformers():
    embeddings = ViTMAEEmbeddings(ViTMAEConfig(hidden_size=96, image_size=112, patch_size=16))
    embeddings.initialize_weights()
    torch.testing.assert_close(
        sincos_pos_embed(96, 7), embeddings.position_embeddings.detach(), rtol=0, atol=1e-6
    )


def test_model_holds_the_tables_and_does_not_train_them():
    model = build_mae("mae_vit_tiny_patch16", img_size=48, patch_size=8)
    assert torch.equal(model.pos_embed, sincos_pos_embed(192, 6))
    assert torch.equal(model.decoder_pos_embed, sincos_pos_embed(128, 6))
    assert not model.pos_embed.requires_grad and not model.decoder_pos_embed.requires_grad
    assert {"pos_embed", "decoder_pos_embed"} <= set(model.state_dict())


def bicubic_matrix(old: int, new: int) -> np.ndarray:
    """Give weights [new, old] of cubic convolution: a = -0.75, aligned pixel centres, repeated
    edges."""

    def kernel(x: float, a: float = -0.75) -> float:
        x = abs(x)
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

    weights = np.zeros((new, old))
    for i in range(new):
        centre = (i + 0.5) * old / new - 0.5
        for tap in range(math.floor(centre) - 1, math.floor(centre) + 3):
            weights[i, min(max(tap, 0), old - 1)] += kernel(centre - tap)
    return weights


@pytest.mark.parametrize(("old", "new"), [(14, 28), (14, 24), (16, 32), (14, 7), (14, 5), (4, 9)])
def test_interpolation_formula(old: int, new: int):
    generator = torch.Generator().manual_seed(0)
    pos_embed = torch.randn(1, 1 + old * old, 8, generator=generator)
    got = interpolate_pos_embed(pos_embed, new)
    matrix = bicubic_matrix(old, new)
    grid = pos_embed[0, 1:].double().numpy().reshape(old, old, 8)
    expected = np.einsum("ri,cj,ijd->rcd", matrix, matrix, grid).reshape(new * new, 8)
    np.testing.assert_allclose(got[0, 1:].numpy(), expected, atol=2e-5)
    assert torch.equal(got[:, 0], pos_embed[:, 0])


def test_interpolation_keeps_the_same_grid_and_the_dtype():
    pos_embed = sincos_pos_embed(64, 14)
    assert torch.equal(interpolate_pos_embed(pos_embed, 14), pos_embed)
    low = interpolate_pos_embed(pos_embed.bfloat16(), 28)
    assert low.dtype == torch.bfloat16 and low.shape == (1, 785, 64)
