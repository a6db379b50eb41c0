"""Floating-point operations for an image, by formula.

Matrix products (attention's among them) and the projection of patches are counted, 2 operations
for a multiply-add, as in the definition of model FLOPs utilisation (PaLM, arXiv 2204.02311,
appendix B). Norms, activations, softmax and the optimiser are not counted, and neither are
activations computed again under activation checkpointing: they are a cost of the implementation,
not of the model.
"""

from __future__ import annotations

from typing import Any

from mae_scale.models.classifier import Classifier
from mae_scale.models.encoder import Encoder
from mae_scale.models.mae import MaskedAutoencoderViT


def blocks_flops(depth: int, tokens: int, width: int, hidden: int | None = None) -> int:
    """Count the forward operations of transformer blocks on an image.

    Args:
        depth: number of blocks.
        tokens: number of tokens of the image.
        width: channels of a token.
        hidden: channels of the MLPs' hidden layers; None: 4 x width.
    """
    hidden = 4 * width if hidden is None else hidden
    linear = 2 * tokens * width * (3 * width + width + 2 * hidden)  # qkv, proj, fc1 and fc2
    attention = 2 * 2 * tokens**2 * width  # q times k, and the weights times v
    return depth * (linear + attention)


def _hidden(blocks: Any) -> int:
    """Return the channels of the hidden layers in the blocks' MLPs."""
    return blocks[0].mlp.fc1.out_features


def patch_embed_flops(patches: int, patch_size: int, width: int, channels: int = 3) -> int:
    """Count the forward operations of projecting patches to tokens.

    Args:
        patches: number of patches.
        patch_size: side of a patch in pixels.
        width: channels of a token.
        channels: bands of the image.
    """
    return 2 * patches * patch_size**2 * channels * width


def _projected(model: MaskedAutoencoderViT) -> int:
    """Count the patches of an image that are projected: by default all, masked ones, too."""
    return model.encoder_tokens - 1 if model.projects_visible_only else model.num_patches


def forward_flops(model: MaskedAutoencoderViT) -> int:
    """Count the operations of the forward pass of one image at the model's own mask ratio."""
    embed_dim, width = model.decoder_embed.in_features, model.decoder_embed.out_features
    patch_embed = patch_embed_flops(_projected(model), model.patch_size, embed_dim, model.in_chans)
    visible = model.encoder_tokens
    tokens = 1 + model.num_patches
    encoder = blocks_flops(len(model.blocks), visible, embed_dim, _hidden(model.blocks))
    decoder_embed = 2 * visible * embed_dim * width
    blocks = model.decoder_blocks
    decoder = blocks_flops(len(blocks), tokens, width, _hidden(blocks))
    decoder_pred = 2 * tokens * width * model.decoder_pred.out_features
    return patch_embed + encoder + decoder_embed + decoder + decoder_pred


def training_flops(model: MaskedAutoencoderViT) -> int:
    """Count the operations for one image, forward and backward.

    A backward pass takes twice as many as the forward pass: one product for the gradient of the
    weights, and one for that of the input. The images need no gradient, which saves the patch
    embedding one product.
    """
    embed_dim = model.decoder_embed.in_features
    patch_embed = patch_embed_flops(_projected(model), model.patch_size, embed_dim, model.in_chans)
    return 3 * forward_flops(model) - patch_embed


def classifier_training_flops(model: Classifier) -> int:
    """Count the operations for one image of a classifier, forward and backward.

    Frozen blocks have a forward pass only, since nothing before them is trained either.
    """
    embed_dim = model.cls_token.shape[-1]
    patch_embed = patch_embed_flops(model.num_patches, model.patch_size, embed_dim, model.in_chans)
    if model.patch_embed.proj.weight.requires_grad:
        patch_embed *= 2  # forward and weights; the images need no gradient
    trained = sum(any(p.requires_grad for p in block.parameters()) for block in model.blocks)
    passes = len(model.blocks) + 2 * trained
    head = sum(2 * p.numel() for p in model.head.parameters() if p.ndim > 1)
    tokens, hidden = 1 + model.num_patches, _hidden(model.blocks)
    return patch_embed + blocks_flops(passes, tokens, embed_dim, hidden) + 3 * head


def recomputed_flops(model: Encoder) -> int:
    """Count the operations for one image that the model's activation checkpointing adds."""
    stacks = [(model.blocks, model.encoder_tokens, model.cls_token.shape[-1])]
    if isinstance(model, MaskedAutoencoderViT):
        width = model.decoder_embed.out_features
        stacks.append((model.decoder_blocks, 1 + model.num_patches, width))
    total = 0
    for blocks, tokens, width in stacks:
        again = sum(
            model.recomputes(number) and any(p.requires_grad for p in block.parameters())
            for number, block in enumerate(blocks)
        )
        total += blocks_flops(again, tokens, width, _hidden(blocks))
    return total
