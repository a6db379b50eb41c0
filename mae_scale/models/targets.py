"""What the decoder is to predict (paper section 3, "Reconstruction target"; Table 1d), in fp32."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from mae_scale.errors import UserError

Target = Literal["pixels", "pca", "tokens"]


def patchify(images: torch.Tensor, patch_size: int) -> torch.Tensor:
    """[B, 3, H, W] -> [B, L, p*p*3]; patches row by row, within a patch (row, column, channel)."""
    b, c, h, w = images.shape
    p = patch_size
    x = images.reshape(b, c, h // p, p, w // p, p)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, (h // p) * (w // p), p * p * c)


def unpatchify(patches: torch.Tensor, patch_size: int) -> torch.Tensor:
    """[B, L, p*p*C] of a square image -> [B, C, H, W]; the inverse of `patchify`."""
    b, num_patches, d = patches.shape
    p, g = patch_size, round(num_patches**0.5)
    x = patches.reshape(b, g, g, p, p, d // (p * p))
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, -1, g * p, g * p)


def patch_statistics(patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each patch, both [B, L, 1].

    The deviation is sqrt(var + 1e-6) with the unbiased variance, as in the authors' code.
    """
    var, mean = torch.var_mean(patches, dim=-1, keepdim=True, correction=1)
    return mean, (var + 1e-6).sqrt()


def masked_mean(per_patch: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of float32 [B, L] over the removed patches of the whole batch, those with mask 1."""
    return (per_patch * mask).sum() / mask.sum()


def mean_squared_error(
    pred: torch.Tensor, target: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Mean squared error over the removed patches, in fp32 whatever the dtype of `pred`.

    Args:
        pred, target: [B, L, d].
        mask: [B, L], 1 on removed patches.

    Returns:
        float32 scalar.
    """
    return masked_mean((pred.float() - target).square().mean(dim=-1), mask)


def token_cross_entropy(
    pred: torch.Tensor, token_ids: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Cross-entropy of a tokenizer's ids over the removed patches (paper Table 1d), in fp32.

    Args:
        pred: [B, L, V], logits of any floating dtype.
        token_ids: int64 [B, L] in [0, V).
        mask: [B, L], 1 on removed patches.

    Returns:
        float32 scalar.
    """
    per_patch = cross_entropy(pred.flatten(0, 1).float(), token_ids.flatten(), reduction="none")
    return masked_mean(per_patch.view_as(mask), mask)


class PatchPCA(nn.Module):
    """The largest PCA coefficients of a patch's pixels (paper Table 1d), kept in fp32.

    A new one gives the first pixels; `state_from` makes the state of a fitted one.

    Args:
        width: d, pixel values of a patch.
        components: k, coefficients.

    Raises:
        UserError: more components than pixel values.
    """

    mean: torch.Tensor
    components: torch.Tensor

    def __init__(self, width: int, components: int) -> None:
        super().__init__()
        if not 1 <= components <= width:
            raise UserError(
                f"pca_components {components} must be from 1 to the {width} pixel values of a patch"
            )
        self.register_buffer("mean", torch.empty(width))
        self.register_buffer("components", torch.empty(components, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Make the coefficients those of the first pixel values."""
        self.mean.zero_()
        self.components.copy_(torch.eye(*self.components.shape))

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """[..., d] -> [..., k], in fp32."""
        return (patches.float() - self.mean) @ self.components.T

    def inverse(self, coefficients: torch.Tensor) -> torch.Tensor:
        """[..., k] -> the patches [..., d] with these coefficients and no others."""
        return coefficients.float() @ self.components + self.mean

    @staticmethod
    def state_from(patches: Iterable[torch.Tensor], components: int) -> dict[str, torch.Tensor]:
        """Mean and components of a sample of patches, by the covariance in float64.

        Args:
            patches: tensors [n, d] that together are the sample.
            components: k.

        Returns:
            "mean" float32 [d] and "components" float32 [k, d], orthonormal, the largest variance
            first, each with its largest entry positive.
        """
        count, total, products = 0, torch.zeros(()), torch.zeros(())
        for part in patches:
            values = part.double()
            count += len(values)
            total, products = total + values.sum(dim=0), products + values.T @ values
        mean = total / count
        _, vectors = torch.linalg.eigh(products / count - torch.outer(mean, mean))
        found = vectors.T.flip(0)[:components]
        largest = found.gather(1, found.abs().argmax(dim=1, keepdim=True))
        return {"mean": mean.float(), "components": (found * largest.sign()).float()}
