"""Targets of the decoder (paper section 3, "Reconstruction target"; Table 1d), in fp32."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.functional import cross_entropy, layer_norm

from mae_scale.errors import UserError
from mae_scale.models.numerics import full_fp32


def patchify(images: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Cut [B, C, H, W] into patches, row by row: [B, L, p*p*C], each (row, column, channel)."""
    b, c, h, w = images.shape
    p = patch_size
    x = images.reshape(b, c, h // p, p, w // p, p)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, (h // p) * (w // p), p * p * c)


def unpatchify(
    patches: torch.Tensor, patch_size: int, grid: tuple[int, int] | None = None
) -> torch.Tensor:
    """Put patches [B, L, p*p*C] together to images [B, C, H, W]; the inverse of `patchify`.

    Args:
        grid: rows and columns of patches; None: the image is square.
    """
    b, num_patches, d = patches.shape
    if grid is None:
        side = round(num_patches**0.5)
        grid = (side, side)
    (rows, columns), p = grid, patch_size
    x = patches.reshape(b, rows, columns, p, p, d // (p * p))
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, -1, rows * p, columns * p)


def patch_statistics(patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation of each patch, both [B, L, 1].

    The deviation is sqrt(var + 1e-6) with the unbiased variance, as in the authors' code.
    """
    var, mean = torch.var_mean(patches, dim=-1, keepdim=True, correction=1)
    return mean, (var + 1e-6).sqrt()


def masked_mean(per_patch: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Average float32 [B, L] over the removed patches of the whole batch, those with mask 1."""
    return (per_patch * mask).sum() / mask.sum()


class Target(nn.Module):
    """A target, which the decoder predicts for each patch. A new one is a subclass in `TARGETS`.

    State-dict keys of a target begin with its name, such as `pca.mean`.

    Attributes:
        width: number of values that the decoder predicts for a patch, d.
        is_image: whether a prediction can be drawn as an image.
        needs_tokenizer: whether the decoder predicts the ids of a tokenizer.
        fitted_on: number of images that `fit` wants to see when a run starts; 0: none.
    """

    width: int
    is_image = True
    needs_tokenizer = False
    fitted_on = 0

    def reset_parameters(self) -> None:
        """Set what the target keeps to its initial values."""

    def fit(self, patches: Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Compute what the target keeps from the patches of images, float32 [n, p*p*C] each."""
        return {}

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Make the target of true patches: float32 [B, L, p*p*C] -> float32 [B, L, d]."""
        raise NotImplementedError

    def loss(
        self,
        pred: torch.Tensor,
        patches: torch.Tensor,
        mask: torch.Tensor,
        token_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute the loss over the removed patches, in fp32 whatever the dtype of `pred`.

        Args:
            pred: [B, L, d].
            patches: float32 [B, L, p*p*C], the true ones.
            mask: [B, L], 1 on removed patches.
            token_ids: int64 [B, L], ids from a tokenizer, where the target needs them.

        Returns:
            Mean squared error, float32 scalar.
        """
        # bf16 minus fp32 is fp32, so a copy of the prediction in fp32 would gain nothing.
        return masked_mean((pred - self(patches)).square().mean(dim=-1), mask)

    def to_pixels(self, pred: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """Turn a prediction into the pixels of patches, float32 [B, L, p*p*C].

        Args:
            pred: float32 [B, L, d], the prediction.
            patches: float32 [B, L, p*p*C], the true ones.
        """
        raise NotImplementedError


class Pixels(Target):
    """The pixels of a patch, normalised by its own mean and deviation (paper section 3).

    Args:
        patch_values: number of values of a patch, p*p*C.
        norm_pix_loss: whether the pixels are normalised.
        fewer_passes: whether to normalise by LayerNorm, which reads and writes the patches once.
    """

    def __init__(
        self,
        patch_values: int,
        *,
        norm_pix_loss: bool,
        fewer_passes: bool = False,
        **unused: object,
    ) -> None:
        super().__init__()
        self.width, self._normalises = patch_values, norm_pix_loss
        self._fewer_passes = fewer_passes

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Make the target of true patches, float32 [B, L, p*p*C]; it has the same shape."""
        if not self._normalises:
            return patches
        if self._fewer_passes:
            # LayerNorm divides by sqrt(biased variance + eps), the authors by sqrt(unbiased
            # variance + 1e-6). With this eps the two differ by a constant factor.
            n = self.width
            scale = torch.full((n,), ((n - 1) / n) ** 0.5, device=patches.device)
            return layer_norm(patches, (n,), weight=scale, eps=1e-6 * (n - 1) / n)
        mean, std = patch_statistics(patches)
        return (patches - mean) / std

    def to_pixels(self, pred: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """Give a normalised prediction the true means and deviations, as the authors do."""
        if not self._normalises:
            return pred
        mean, std = patch_statistics(patches)
        return pred * std + mean


class Tokens(Target):
    """The id that a tokenizer gives to a patch (paper Table 1d), predicted as logits.

    Args:
        patch_values: number of values of a patch, p*p*C.
        vocabulary_size: number of different ids.

    Raises:
        UserError: there are no ids.
    """

    is_image = False
    needs_tokenizer = True

    def __init__(self, patch_values: int, *, vocabulary_size: int, **unused: object) -> None:
        super().__init__()
        if vocabulary_size < 1:
            raise UserError(f"vocabulary_size {vocabulary_size} must be at least 1")
        self.width = vocabulary_size

    def loss(
        self,
        pred: torch.Tensor,
        patches: torch.Tensor,
        mask: torch.Tensor,
        token_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute the cross-entropy over the removed patches in fp32; see `Target.loss`."""
        if token_ids is None:
            raise ValueError("the target is token ids; forward needs them")
        return token_cross_entropy(pred, token_ids, mask)


def token_cross_entropy(
    pred: torch.Tensor, token_ids: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Compute the cross-entropy of ids over the removed patches (paper Table 1d), in fp32.

    Args:
        pred: [B, L, V], logits of any floating dtype.
        token_ids: int64 [B, L] in [0, V).
        mask: [B, L], 1 on removed patches.

    Returns:
        float32 scalar.
    """
    per_patch = cross_entropy(pred.flatten(0, 1).float(), token_ids.flatten(), reduction="none")
    return masked_mean(per_patch.view_as(mask), mask)


class PatchPCA(Target):
    """The largest PCA coefficients of a patch's pixels (paper Table 1d), kept in fp32.

    A new target takes the first pixel values as coefficients; `fit` computes the state of a fitted
    one.

    Args:
        patch_values: number of values of a patch, p*p*C.
        pca_components: number of coefficients, k.

    Raises:
        UserError: there are more components than pixel values, or none.
    """

    mean: torch.Tensor
    components: torch.Tensor
    fitted_on = 2048

    def __init__(self, patch_values: int, *, pca_components: int, **unused: object) -> None:
        super().__init__()
        if not 1 <= pca_components <= patch_values:
            raise UserError(
                f"pca_components {pca_components} must be from 1 to the {patch_values} pixel "
                "values of a patch"
            )
        self.width = pca_components
        self.register_buffer("mean", torch.empty(patch_values))
        self.register_buffer("components", torch.empty(pca_components, patch_values))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Make the coefficients those of the first pixel values."""
        self.mean.zero_()
        self.components.copy_(torch.eye(*self.components.shape))

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Compute the coefficients in fp32: [..., p*p*C] -> [..., k]."""
        with full_fp32():
            return (patches.float() - self.mean) @ self.components.T

    def to_pixels(self, pred: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """Sum the components: coefficients [..., k] -> patches [..., p*p*C]."""
        with full_fp32():
            return pred.float() @ self.components + self.mean

    def fit(self, patches: Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Compute mean and components of a sample of patches from the covariance, in float64.

        Args:
            patches: tensors [n, d] that together are the sample; d is p*p*C here.

        Returns:
            "mean" float32 [d] and "components" float32 [k, d], orthonormal, sorted by falling
            variance, the largest entry of each positive.
        """
        count, total, products = 0, torch.zeros(()), torch.zeros(())
        for part in patches:
            values = part.double()
            count += len(values)
            total, products = total + values.sum(dim=0), products + values.T @ values
        mean = total / count
        _, vectors = torch.linalg.eigh(products / count - torch.outer(mean, mean))
        found = vectors.T.flip(0)[: self.width]
        largest = found.gather(1, found.abs().argmax(dim=1, keepdim=True))
        return {"mean": mean.float(), "components": (found * largest.sign()).float()}


TARGETS: dict[str, type[Target]] = {"pixels": Pixels, "pca": PatchPCA, "tokens": Tokens}
