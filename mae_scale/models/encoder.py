"""The encoder that pre-training and classification share: a plain Vision Transformer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from itertools import islice
from typing import Any, Literal

import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mae_scale.config.sizes import ImageSize, plain_size, sides
from mae_scale.errors import UserError
from mae_scale.models.compiled import GraphDropPath
from mae_scale.models.pos_embed import sincos_pos_embed

Pool = Literal["mean", "token"]  # features of an image: mean over patches, or class token

layer_norm: Any = partial(nn.LayerNorm, eps=1e-6)
transformer_block = partial(Block, qkv_bias=True, norm_layer=layer_norm)


class PatchProjection(nn.Conv2d):
    """The projection of patches: a convolution of images, or a linear map of chosen patches.

    Both compute the same numbers but for rounding, since the stride is the kernel's size.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Project [B, C, H, W] to [B, D, H/p, W/p], or patches [B, K, C, p, p] to [B, K, D]."""
        if x.ndim == 4:
            return super().forward(x)
        return F.linear(x.flatten(2), self.weight.flatten(1), self.bias)


class Encoder(nn.Module):
    """Patch and position embeddings, class token and blocks; a subclass adds what follows.

    State-dict keys are those of the published weights.

    Args:
        img_size: side of the square image in pixels, or its height and width.
        patch_size: side of a patch, in pixels.
        embed_dim, depth, num_heads: width, blocks and attention heads of the transformer.
        drop_path: rate of stochastic depth in the last block; it rises linearly from 0.
        mlp_ratio: width of the MLPs' hidden layers divided by that of the blocks.
        make_block: function that makes a block from its number and its rate of stochastic depth;
            None: timm's block, as in pre-training.
        in_chans: number of channels of an image.

    Raises:
        UserError: sizes that do not fit each other.
    """

    def __init__(
        self,
        img_size: ImageSize,
        patch_size: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        drop_path: float = 0.0,
        mlp_ratio: float = 4.0,
        make_block: Callable[[int, float], nn.Module] | None = None,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        _check_image(img_size, patch_size)
        check_transformer("", embed_dim, depth, num_heads)
        if mlp_ratio * embed_dim < 1:
            raise UserError(f"mlp_ratio {mlp_ratio:g} leaves the MLPs no hidden channel")
        self._checkpoint_every = 0
        self._offload = False
        self._is_random = drop_path > 0

        self.patch_embed = PatchEmbed(plain_size(img_size), patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.num_patches, embed_dim))
        if make_block is None:

            def make_block(number: int, rate: float) -> nn.Module:
                return transformer_block(embed_dim, num_heads, mlp_ratio=mlp_ratio, drop_path=rate)

        rates = drop_path_rates(drop_path, depth)
        self.blocks = nn.ModuleList(make_block(i, rate) for i, rate in enumerate(rates))

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return self.patch_embed.patch_size[0]

    @property
    def in_chans(self) -> int:
        """Number of channels of an image."""
        return self.patch_embed.proj.in_channels

    @property
    def grid(self) -> tuple[int, int]:
        """Numbers of rows and columns of patches."""
        return self.patch_embed.grid_size

    @property
    def num_patches(self) -> int:
        """Number of patches per image, L."""
        return self.patch_embed.num_patches

    @property
    def encoder_tokens(self) -> int:
        """Number of tokens of an image that the blocks see, class token included."""
        return 1 + self.num_patches

    def check_images(self, images: torch.Tensor) -> None:
        """Raise a UserError where images are not floats [B, C, H, W] of the model's size.

        Args:
            images: the argument that a user gave to the model.
        """
        if not isinstance(images, torch.Tensor):
            raise UserError(f"images must be a tensor, not {type(images).__name__}")
        if not images.is_floating_point():
            raise UserError(
                f"images are {images.dtype}, and the model takes normalised floats: "
                "mae_scale.normalize(images)"
            )
        expected = [self.in_chans, *self.patch_embed.img_size]
        if images.ndim != 4 or list(images.shape[1:]) != expected:
            more = "; images[None] is a batch of one" if list(images.shape) == expected else ""
            raise UserError(
                f"images are {list(images.shape)}, expected "
                f"[B, {', '.join(map(str, expected))}]{more}"
            )

    def initialize_weights(self) -> None:
        """Set every parameter as the authors do, also in a model made on the meta device."""
        for module in self.modules():
            self.initialize_module(module)

    @torch.no_grad()
    def initialize_module(self, module: nn.Module) -> None:
        """Set the own parameters of one of `self.modules()`, not those of the modules in it."""
        if module is self:
            self.pos_embed.copy_(sincos_pos_embed(self.pos_embed.shape[-1], self.grid))
            nn.init.normal_(self.cls_token, std=0.02)
        elif isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm | GraphDropPath):
            module.reset_parameters()
        elif module is self.patch_embed.proj:
            # The projection of patches acts as a Linear, but its bias starts as a convolution's.
            module.reset_parameters()
            nn.init.xavier_uniform_(module.weight.view(module.out_channels, -1))

    def set_activation_checkpointing(
        self, every: Literal["none", "full"] | int, offload: bool = False
    ) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations.

        Args:
            every: "none", "full" (each block), or k for every k-th block of encoder and decoder.
            offload: keep the input of each recomputed block in host memory until the backward
                pass.

        Raises:
            UserError: `every` is anything else, or `offload` is set without recomputed blocks.
        """
        blocks = {"none": 0, "full": 1}.get(every) if isinstance(every, str) else every
        if blocks is None or (blocks < 1 and every != "none"):
            raise UserError(
                f"activation_checkpointing {every!r} must be none, full, or a number k of at "
                "least 1 for every k-th block"
            )
        if offload and not blocks:
            raise UserError(
                "activation_offload moves the inputs of recomputed blocks to the host; it needs "
                "activation_checkpointing full or a number"
            )
        self._checkpoint_every, self._offload = blocks, offload

    def recomputes(self, number: int) -> bool:
        """Return whether the block of this number, in encoder or decoder, is computed again."""
        return self._checkpoint_every > 0 and number % self._checkpoint_every == 0

    @property
    def offloads(self) -> bool:
        """Whether the inputs of recomputed blocks wait in host memory."""
        return self._offload

    def embed_chosen_patches(self, images: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Embed some patches as `embed_patches` does, without computing the others.

        Args:
            images: float [B, C, H, W], normalised.
            ids: int64 [B, K], numbers of the patches row by row.

        Returns:
            [B, K, D].
        """
        b, p, (rows, columns) = len(images), self.patch_size, self.grid
        patches = images.reshape(b, -1, rows, p, columns, p).permute(0, 2, 4, 1, 3, 5)
        image = torch.arange(b, device=ids.device)[:, None]
        chosen = patches[image, ids // columns, ids % columns]
        projection = self.patch_embed.proj
        return projection(chosen.to(projection.weight.dtype)) + self.pos_embed[0, 1:][ids]

    def embed_patches(self, images: torch.Tensor) -> torch.Tensor:
        """Embed all patches, with their positions.

        Args:
            images: float [B, C, H, W], normalised.

        Returns:
            [B, L, D] in the dtype of the weights.
        """
        x = self.patch_embed(images.to(self.patch_embed.proj.weight.dtype))
        return x + self.pos_embed[:, 1:]

    def prepend_cls_token(self, x: torch.Tensor) -> torch.Tensor:
        """Put the class token before the patches: [B, K, D] -> [B, 1 + K, D]."""
        cls_token = self.cls_token + self.pos_embed[:, :1]
        return torch.cat([cls_token.expand(len(x), -1, -1), x], dim=1)

    def run_blocks(self, blocks: Iterable[nn.Module], x: torch.Tensor) -> torch.Tensor:
        """Apply blocks one after the other, recomputing some in the backward pass."""
        for i, block in enumerate(blocks):
            x = self.run_block(i, block, x)
        return x

    def run_block(self, number: int, block: nn.Module, *inputs: Any) -> torch.Tensor:
        """Apply the block of this number, recomputing it in the backward pass if that is due."""
        if not self.recomputes(number):
            return block(*inputs)
        # The hooks of the outer context get the block's input only, because those of checkpoint
        # apply inside. With pinned memory the host need not wait for the device's copy.
        with save_on_cpu(pin_memory=inputs[0].is_cuda) if self._offload else nullcontext():
            # Without drop path nothing in a block is random, so no generator must be put back.
            return checkpoint(
                block, *inputs, use_reentrant=False, preserve_rng_state=self._is_random
            )


def drop_path_rates(last: float, depth: int) -> list[float]:
    """Return each block's rate of stochastic depth: linear from 0 to `last` (paper Table 9).

    Raises:
        UserError: `last` is no probability below 1.
    """
    if not 0 <= last < 1:
        raise UserError(f"drop_path {last} must lie in 0 to 1, 1 excluded")
    return [last * i / max(1, depth - 1) for i in range(depth)]


def _multiples_near(size: int, step: int) -> str:
    below = size // step * step
    return ", ".join(str(n) for n in (below, below + step) if n > 0)


def _check_image(img_size: ImageSize, patch_size: int) -> None:
    if patch_size < 1:
        raise UserError(f"patch_size {patch_size} must be at least 1 pixel")
    for side in sides(img_size):
        if side < 1 or side % patch_size:
            raise UserError(
                f"img_size {side} is no multiple of patch_size {patch_size}; "
                f"nearest: {_multiples_near(max(side, 1), patch_size)}"
            )


def check_transformer(prefix: str, width: int, depth: int, heads: int) -> None:
    """Raise a UserError where a transformer's sizes do not fit each other."""
    if min(width, depth, heads) < 1:
        raise UserError(
            f"{prefix}embed_dim {width}, {prefix}depth {depth} and {prefix}num_heads {heads} "
            "must each be at least 1"
        )
    if width % 4:
        raise UserError(
            f"{prefix}embed_dim {width} must be divisible by 4 for the sine-cosine position "
            f"embedding; nearest: {_multiples_near(width, 4)}"
        )
    if width % heads:
        near = min(heads, width)
        tried = (n for k in range(10**6) for n in {near - k, near + k} if 1 <= n <= width)
        nearest = sorted(islice((n for n in tried if width % n == 0), 2))
        raise UserError(
            f"{prefix}embed_dim {width} does not divide among {prefix}num_heads {heads}; "
            f"nearest numbers of heads that fit: {', '.join(map(str, nearest))}"
        )
