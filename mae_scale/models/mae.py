"""Masked autoencoder with a Vision Transformer backbone (paper section 3), on timm's blocks."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from mae_scale.config.sizes import ImageSize
from mae_scale.errors import UserError, did_you_mean
from mae_scale.models.encoder import (
    Encoder,
    PatchProjection,
    Pool,
    check_transformer,
    layer_norm,
    transformer_block,
)
from mae_scale.models.masking import (
    Sampling,
    check_sampling,
    mask_noise,
    num_kept,
    random_masking,
)
from mae_scale.models.pos_embed import sincos_pos_embed
from mae_scale.models.targets import TARGETS, Target, patchify, unpatchify

# Base, large and huge are the authors' models; their decoder is 512 wide and 8 blocks deep (paper
# Table 1). The two small ones are made for tests, CIFAR and the demo: they have DeiT's widths, and
# a decoder of the same proportion to the encoder (2/3 of its width) but only 4 blocks. With an
# encoder so small, a deeper decoder, which sees all patches, would be most of the cost.
_DECODER = {"decoder_embed_dim": 512, "decoder_depth": 8, "decoder_num_heads": 16}
MODELS: dict[str, dict[str, int]] = {
    "mae_vit_tiny_patch16": {
        "embed_dim": 192,
        "depth": 12,
        "num_heads": 3,
        "decoder_embed_dim": 128,
        "decoder_depth": 4,
        "decoder_num_heads": 4,
    },
    "mae_vit_small_patch16": {
        "embed_dim": 384,
        "depth": 12,
        "num_heads": 6,
        "decoder_embed_dim": 256,
        "decoder_depth": 4,
        "decoder_num_heads": 8,
    },
    "mae_vit_base_patch16": {"embed_dim": 768, "depth": 12, "num_heads": 12, **_DECODER},
    "mae_vit_large_patch16": {"embed_dim": 1024, "depth": 24, "num_heads": 16, **_DECODER},
    "mae_vit_huge_patch14": {
        "patch_size": 14,
        "embed_dim": 1280,
        "depth": 32,
        "num_heads": 16,
        **_DECODER,
    },
}


def build_mae(name: str, **overrides: Any) -> MaskedAutoencoderViT:
    """Build a masked autoencoder with fresh weights, drawn from torch's global generator.

    Defaults are those of the authors' functions of the same names, so that code for theirs computes
    the same here. One of them differs from the recipes of these names, which predict normalised
    pixels as the authors' command lines do: give `norm_pix_loss=True` for that.

    Args:
        name: one of `MODELS`; all its sizes, patches included, are defaults.
        overrides: keyword arguments of `MaskedAutoencoderViT` that replace the model's own.

    Raises:
        UserError: the name or an argument is unknown, or sizes or a mask ratio do not fit each
            other.
    """
    check_arguments(MaskedAutoencoderViT, overrides)
    return MaskedAutoencoderViT(**{**architecture(name), **overrides})


def check_arguments(model: type[nn.Module], given: Iterable[str]) -> None:
    """Raise a UserError where a model has no keyword argument of a name."""
    known = inspect.signature(model).parameters
    for name in given:
        if name not in known:
            hint = did_you_mean(name, known, f"they are {', '.join(known)}")
            raise UserError(f"{model.__name__} has no argument {name!r}; {hint}")


def architecture(name: str) -> dict[str, int]:
    """Return the keyword arguments of one of `MODELS`.

    Raises:
        UserError: the name is unknown.
    """
    if name not in MODELS:
        hint = did_you_mean(name, MODELS)
        raise UserError(f"unknown model {name!r}; {hint} Known are {', '.join(MODELS)}")
    return MODELS[name]


class MaskedAutoencoderViT(Encoder):
    """Asymmetric autoencoder: the encoder sees the visible patches, a small decoder all of them.

    State-dict keys are those of the published weights; under the target "pca" `pca.*` is added.
    `pos_embed` and `decoder_pos_embed` are parameters that are not trained. The arguments
    from `mask_ratio` on are the switches of the paper's Table 1 and Figure 5.

    Args:
        img_size: side of the square image in pixels, or its height and width.
        patch_size: side of a patch, in pixels.
        in_chans: number of channels of an image.
        embed_dim, depth, num_heads: width, blocks and attention heads of the encoder.
        decoder_embed_dim, decoder_depth, decoder_num_heads: the same of the decoder.
        mlp_ratio: width of the MLPs' hidden layers divided by that of the blocks, in both.
        mask_ratio: share of patches that is removed; `int(L * (1 - mask_ratio))` stay.
        mask_sampling: how `noise` chooses the patches to remove: "random", "block" or "grid".
        mask_tokens_in_encoder: whether the encoder sees all patches, with a mask token in the place
            of each removed one, and the decoder gets all its outputs (Table 1c).
        target: "pixels"; "pca", the largest PCA coefficients of a patch's pixels; or "tokens", ids
            that a tokenizer gives to the patches (Table 1d).
        norm_pix_loss: whether to predict pixels normalised within their patch (paper section 3).
        pca_components: number of coefficients under "pca".
        vocabulary_size: number of different ids under "tokens".
        fewer_passes: whether to gather the pixels of visible patches before they are projected, and
            to normalise the target in one pass. The numbers are the same but for rounding.

    Raises:
        UserError: sizes, a mask ratio or switches that do not fit each other.
    """

    def __init__(
        self,
        *,
        img_size: ImageSize = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.0,
        mask_ratio: float = 0.75,
        mask_sampling: Sampling = "random",
        mask_tokens_in_encoder: bool = False,
        target: str = "pixels",
        norm_pix_loss: bool = False,
        pca_components: int = 96,
        vocabulary_size: int = 8192,
        fewer_passes: bool = False,
    ) -> None:
        super().__init__(
            img_size,
            patch_size,
            embed_dim,
            depth,
            num_heads,
            mlp_ratio=mlp_ratio,
            in_chans=in_chans,
        )
        check_transformer("decoder_", decoder_embed_dim, decoder_depth, decoder_num_heads)
        check_sampling(mask_sampling, self.num_patches, mask_ratio, self.grid)
        if target not in TARGETS:
            *some, last = TARGETS
            raise UserError(f"target {target!r} must be {', '.join(some)} or {last}")
        if norm_pix_loss and target != "pixels":
            raise UserError(
                f"norm_pix_loss normalises pixels; with target {target} it must be false"
            )
        self.mask_ratio, self.mask_sampling = mask_ratio, mask_sampling
        self.mask_tokens_in_encoder = mask_tokens_in_encoder
        self.projects_visible_only = fewer_passes and not mask_tokens_in_encoder
        if self.projects_visible_only:
            self.patch_embed.proj.__class__ = PatchProjection  # its weights are already drawn
        self._target, self.norm_pix_loss = target, norm_pix_loss
        tokens = 1 + self.num_patches
        self.pos_embed.requires_grad_(False)
        self.norm = layer_norm(embed_dim)

        width = decoder_embed_dim
        self.decoder_embed = nn.Linear(embed_dim, width)
        mask_token_width = embed_dim if mask_tokens_in_encoder else width
        self.mask_token = nn.Parameter(torch.zeros(1, 1, mask_token_width))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, tokens, width), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(
            transformer_block(width, decoder_num_heads, mlp_ratio=mlp_ratio)
            for _ in range(decoder_depth)
        )
        self.decoder_norm = layer_norm(width)
        patch_values = patch_size**2 * in_chans
        predicted = TARGETS[target](
            patch_values,
            norm_pix_loss=norm_pix_loss,
            pca_components=pca_components,
            vocabulary_size=vocabulary_size,
            fewer_passes=fewer_passes,
        )
        self.decoder_pred = nn.Linear(width, predicted.width)
        self.add_module(target, predicted)  # its keys begin with its name, such as `pca.mean`

        self.initialize_weights()

    @property
    def target(self) -> Target:
        """Target that the decoder predicts."""
        return getattr(self, self._target)

    @property
    def encoder_tokens(self) -> int:
        """Number of tokens that the blocks see at the model's mask ratio, class token included."""
        if self.mask_tokens_in_encoder:
            return 1 + self.num_patches
        return 1 + num_kept(self.num_patches, self.mask_ratio)

    @torch.no_grad()
    def initialize_module(self, module: nn.Module) -> None:
        """Set the own parameters of one of `self.modules()`, not those of the modules in it."""
        super().initialize_module(module)
        if module is self:
            width = self.decoder_pos_embed.shape[-1]
            self.decoder_pos_embed.copy_(sincos_pos_embed(width, self.grid))
            nn.init.normal_(self.mask_token, std=0.02)
        elif isinstance(module, Target):
            module.reset_parameters()

    def noise(
        self, seed: int, epoch: torch.Tensor, sample: torch.Tensor, mask_ratio: float | None = None
    ) -> torch.Tensor:
        """Return the noise that `forward` takes for images with these keys; see `mask_noise`."""
        ratio = self.mask_ratio if mask_ratio is None else mask_ratio
        patches = self.num_patches
        return mask_noise(seed, epoch, sample, patches, self.mask_sampling, ratio, self.grid)

    def random_noise(self, images: torch.Tensor, mask_ratio: float | None = None) -> torch.Tensor:
        """Draw new noise for images, with a seed from torch's global generator."""
        sample = torch.arange(len(images), device=images.device)
        seed = int(torch.randint(2**62, ()))  # on the CPU, to wait for no GPU
        return self.noise(seed, torch.zeros_like(sample), sample, mask_ratio)

    def forward(
        self,
        images: torch.Tensor,
        noise: torch.Tensor | None = None,
        mask_ratio: float | None = None,
        token_ids: torch.Tensor | None = None,
        pool: Pool | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | torch.Tensor:
        """Mask, encode, decode, compare; or, where `pool` is given, return `features`.

        DeepSpeed gathers sharded weights in `forward` only, which is why both go through it.

        Args:
            images: float [B, C, H, W], normalised; cast to the weights' dtype for the encoder
                only, so pass float32 whatever that dtype is.
            noise: float32 [B, L], as `noise` returns it; in each image the patches with the
                smallest values stay. None: noise drawn by torch's global generator.
            mask_ratio: mask ratio of this call, instead of the model's own.
            token_ids: int64 [B, L], ids from the tokenizer, for the target "tokens".
            pool: as for `features`.

        Returns:
            loss: float32 scalar.
            pred: [B, L, d], predictions of all patches, the kept ones too: p*p*C pixel values
                (normalised by patch under `norm_pix_loss`), PCA coefficients, or logits of ids.
            mask: float32 [B, L], 0 kept, 1 removed.
        """
        if pool is not None:
            return self.features(images, pool)
        self.check_images(images)
        if noise is None:
            noise = self.random_noise(images, mask_ratio)
        if not isinstance(noise, torch.Tensor) or noise.shape != (len(images), self.num_patches):
            given = list(noise.shape) if isinstance(noise, torch.Tensor) else noise
            raise UserError(
                f"noise must be a tensor [{len(images)}, {self.num_patches}], not {given}; the "
                "mask ratio is the argument mask_ratio"
            )
        ratio = self.mask_ratio if mask_ratio is None else mask_ratio
        ids_keep, mask, ids_restore = random_masking(noise, ratio)
        if self.mask_tokens_in_encoder:
            pred = self.decode(
                self.decoder_embed(self.forward_encoder_with_mask_tokens(images, mask))
            )
        else:
            pred = self.forward_decoder(self.forward_encoder(images, ids_keep), ids_restore)
        return self.loss(images, pred, mask, token_ids), pred, mask

    def features(self, images: torch.Tensor, pool: Pool) -> torch.Tensor:
        """Describe whole images, without masking, by the output of the encoder's last LayerNorm.

        Args:
            images: float [B, C, H, W], normalised.
            pool: "token", the output for the class token, or "mean", the mean over the patches.

        Returns:
            float32 [B, embed_dim].
        """
        self.check_images(images)
        x = self.run_blocks(self.blocks, self.prepend_cls_token(self.embed_patches(images)))
        x = self.norm(x)
        return (x[:, 0] if pool == "token" else x[:, 1:].mean(dim=1)).float()

    def loss(
        self,
        images: torch.Tensor,
        pred: torch.Tensor,
        mask: torch.Tensor,
        token_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the loss over the removed patches, a float32 scalar; see `forward`."""
        patches = patchify(images.float(), self.patch_size)
        return self.target.loss(pred, patches, mask, token_ids)

    def forward_encoder(self, images: torch.Tensor, ids_keep: torch.Tensor) -> torch.Tensor:
        """Encode the class token and the visible patches.

        Args:
            images: float [B, C, H, W], normalised.
            ids_keep: int64 [B, K], numbers of the visible patches.

        Returns:
            [B, 1 + K, embed_dim].
        """
        if self.projects_visible_only:
            x = self.embed_chosen_patches(images, ids_keep)
        else:
            x = self.embed_patches(images)
            x = x.gather(1, ids_keep[..., None].expand(-1, -1, x.shape[-1]))
        return self.norm(self.run_blocks(self.blocks, self.prepend_cls_token(x)))

    def forward_encoder_with_mask_tokens(
        self, images: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Encode the class token and all patches, with mask tokens for the removed ones (Table 1c).

        Args:
            images: float [B, C, H, W], normalised.
            mask: [B, L], 1 on removed patches.

        Returns:
            [B, 1 + L, embed_dim].
        """
        mask_tokens = self.mask_token + self.pos_embed[:, 1:]
        x = torch.where(mask[..., None] > 0, mask_tokens, self.embed_patches(images))
        return self.norm(self.run_blocks(self.blocks, self.prepend_cls_token(x)))

    def forward_decoder(self, latent: torch.Tensor, ids_restore: torch.Tensor) -> torch.Tensor:
        """Predict all patches from the visible ones.

        Args:
            latent: [B, 1 + K, embed_dim], as `forward_encoder` returns it.
            ids_restore: int64 [B, L], as `random_masking` returns it.

        Returns:
            [B, L, d], see `forward`.
        """
        x = self.decoder_embed(latent)
        cls_token, visible = x[:, :1], x[:, 1:]
        removed = ids_restore.shape[1] - visible.shape[1]
        patches = torch.cat([visible, self.mask_token.expand(len(x), removed, -1)], dim=1)
        patches = patches.gather(1, ids_restore[..., None].expand(-1, -1, patches.shape[-1]))
        return self.decode(torch.cat([cls_token, patches], dim=1))

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Decode class token and patches, still without positions: [B, 1 + L, D] -> [B, L, d]."""
        x = self.run_blocks(self.decoder_blocks, tokens + self.decoder_pos_embed)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]

    @torch.no_grad()
    def reconstruct(
        self,
        images: torch.Tensor,
        noise: torch.Tensor | None = None,
        mask_ratio: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the prediction as an image; arguments as for `forward`.

        Under `norm_pix_loss` each predicted patch gets the true patch's mean and deviation, as in
        the authors' figures. From PCA coefficients the image is summed up of the components.

        Returns:
            reconstruction: float32 [B, C, H, W], normalised like `images`, all patches predicted.
            mask: float32 [B, 1, H, W], 0 kept, 1 removed.

        Raises:
            UserError: the model predicts token ids, which are no image.
        """
        if not self.target.is_image:
            raise UserError("the model predicts a tokenizer's ids, of which it can draw no image")
        _, pred, mask = self(images, noise, mask_ratio)
        pred = self.target.to_pixels(pred.float(), patchify(images.float(), self.patch_size))
        mask_pixels = mask[..., None].expand(-1, -1, self.patch_size**2)
        return (
            unpatchify(pred, self.patch_size, self.grid),
            unpatchify(mask_pixels, self.patch_size, self.grid),
        )
