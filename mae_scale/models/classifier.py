"""The encoder with a classification head: fine-tuning, probing, training from scratch."""

from __future__ import annotations

from typing import Any, Literal

import torch
from timm.layers import Mlp, trunc_normal_
from torch import nn

from mae_scale.config.sizes import ImageSize
from mae_scale.errors import UserError
from mae_scale.models.encoder import Encoder, Pool, layer_norm
from mae_scale.models.mae import architecture, check_arguments
from mae_scale.models.norms import CountedBatchNorm1d

Head = Literal["linear", "mlp", "probe"]
HEAD_STD = {"linear": 2e-5, "mlp": 2e-5, "probe": 0.01}  # std of its last layer's initial weights


def build_classifier(name: str, num_classes: int, **overrides: Any) -> Classifier:
    """Build the classifier on the encoder of one of `mae.MODELS`, with fresh weights.

    Args:
        name: name of the masked autoencoder; all its sizes, patches included, are defaults.
        num_classes: number of outputs of the head.
        overrides: keyword arguments of `Classifier` that replace the model's own.

    Raises:
        UserError: the name or an argument is unknown, or sizes do not fit each other.
    """
    own = {k: v for k, v in architecture(name).items() if not k.startswith("decoder_")}
    check_arguments(Classifier, overrides)
    return Classifier(num_classes=num_classes, **{**own, **overrides})


def keep_statistics_in_fp32(model: nn.Module) -> None:
    """Put running statistics back to fp32 after a change of the model's dtype; bf16 loses them."""
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.float()


class ProbeHead(nn.Sequential):
    """A linear layer on normalised features: BatchNorm without affine, then Linear (Table 10).

    The statistics are those of the micro-batches of all processes together. The features are
    normalised in fp32 whatever the dtype of the weights. After a change of that
    dtype, call `keep_statistics_in_fp32`.
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__(
            CountedBatchNorm1d(width, affine=False, eps=1e-6), nn.Linear(width, num_classes)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Turn features [B, width] into logits [B, num_classes], in the weights' dtype."""
        norm, linear = self
        return linear(norm(x.float()).to(linear.weight.dtype))


class Classifier(Encoder):
    """A classifier of the pooled, normalised features of all patches (paper Appendix A.1).

    State-dict keys are those of the authors' fine-tuned weights: under mean pooling `fc_norm.*`
    stands for `norm.*`; `head.*` is a Linear, timm's Mlp, or `ProbeHead`.

    Args:
        num_classes: number of outputs.
        img_size: side of the square image in pixels, or its height and width.
        patch_size: side of a patch, in pixels.
        in_chans: channels of an image.
        embed_dim, depth, num_heads: width, blocks and attention heads of the encoder.
        drop_path: rate of stochastic depth in the last block.
        mlp_ratio: width of the MLPs' hidden layers divided by that of the blocks.
        pool: features that are classified: the "mean" of the patches', or those of the class
            "token".
        head: "linear"; "mlp", with one hidden layer of the encoder's width; "probe", a `ProbeHead`.

    Raises:
        UserError: sizes that do not fit each other.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        img_size: ImageSize = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        drop_path: float = 0.0,
        mlp_ratio: float = 4.0,
        pool: Pool = "mean",
        head: Head = "linear",
    ) -> None:
        super().__init__(
            img_size,
            patch_size,
            embed_dim,
            depth,
            num_heads,
            drop_path,
            mlp_ratio,
            in_chans=in_chans,
        )
        if num_classes < 2:
            raise UserError(f"a classifier needs at least 2 classes, not {num_classes}")
        self.num_classes = num_classes
        self.pool, self._head_kind = pool, head
        if pool == "mean":
            self.fc_norm: nn.Module = layer_norm(embed_dim)
        else:
            self.norm: nn.Module = layer_norm(embed_dim)
        self.head: nn.Module
        if head == "linear":
            self.head = nn.Linear(embed_dim, num_classes)
        elif head == "mlp":
            self.head = Mlp(embed_dim, embed_dim, num_classes)
        else:
            self.head = ProbeHead(embed_dim, num_classes)
        self.initialize_weights()

    @property
    def final_norm(self) -> nn.Module:
        """The last LayerNorm."""
        return self.fc_norm if self.pool == "mean" else self.norm

    @property
    def last_linear(self) -> nn.Linear:
        """The layer that computes the logits."""
        return [module for module in self.head.modules() if isinstance(module, nn.Linear)][-1]

    @torch.no_grad()
    def initialize_module(self, module: nn.Module) -> None:
        """Set the own parameters of one of `self.modules()`, not those of the modules in it."""
        super().initialize_module(module)
        if module is self.last_linear:
            trunc_normal_(module.weight, std=HEAD_STD[self._head_kind])
        elif isinstance(module, nn.BatchNorm1d):
            module.reset_running_stats()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Classify images.

        Args:
            images: float [B, C, H, W], normalised.

        Returns:
            Logits, float32 [B, num_classes], since the loss must be computed in fp32.
        """
        return self.head(self.features(images)).float()

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Compute what the head classifies.

        Args:
            images: float [B, C, H, W], normalised.

        Returns:
            [B, embed_dim], in the dtype of the weights.
        """
        self.check_images(images)
        x = self.run_blocks(self.blocks, self.prepend_cls_token(self.embed_patches(images)))
        return self.fc_norm(x[:, 1:].mean(dim=1)) if self.pool == "mean" else self.norm(x)[:, 0]

    def layer_of(self, name: str) -> int:
        """Return the number of a parameter's layer, for layer-wise decay (Table 9).

        It is 0 for class token, position and patch embedding; k + 1 for block k; depth + 1 for the
        rest.
        """
        if name in ("cls_token", "pos_embed") or name.startswith("patch_embed."):
            return 0
        if name.startswith("blocks."):
            return int(name.split(".")[1]) + 1
        return len(self.blocks) + 1

    def tune_last(self, blocks: float) -> None:
        """Freeze all but the head and the last blocks (partial fine-tuning, Figure 9).

        Args:
            blocks: number of blocks to train. 0 trains the head only; 0.5 also the last LayerNorm
                and the last block's MLP with its norm; n, from 1 on, the head, the last LayerNorm
                and the last n blocks.

        Raises:
            UserError: `blocks` is another number, or larger than the number of blocks.
        """
        depth = len(self.blocks)
        if not (blocks == 0.5 or (blocks == int(blocks) and 0 <= blocks <= depth)):
            raise UserError(
                f"tune_blocks {blocks:g} must be 0, 0.5 or a whole number up to the "
                f"{depth} blocks of the encoder"
            )
        self.requires_grad_(False)
        self.head.requires_grad_(True)
        if blocks:
            self.final_norm.requires_grad_(True)
        if blocks == 0.5:
            self.blocks[-1].norm2.requires_grad_(True)
            self.blocks[-1].mlp.requires_grad_(True)
        for block in self.blocks[depth - int(blocks) :]:
            block.requires_grad_(True)
