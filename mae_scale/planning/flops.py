"""Floating-point operations for an image, counted by PyTorch on the meta device.

Matrix products (attention's among them) and convolutions are counted, 2 operations for a
multiply-add, as in the definition of model FLOPs utilisation (PaLM, arXiv 2204.02311, appendix B).
Norms, activations, softmax and the optimiser are not counted, and neither are activations computed
again under activation checkpointing: they are a cost of the implementation, not of the model.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

TrialLoss = Callable[[Any, torch.Tensor], torch.Tensor]
"""Function of a model (or an engine) and images, uint8 [B, C, H, W], that computes the loss of a
training step with targets that are made up."""


@dataclass(frozen=True)
class Flops:
    """Operations for an image."""

    training: int  # operations of the forward and the backward pass
    blocks: tuple[tuple[int, int], ...]
    """Number of each trained block within encoder or decoder, and operations of its forward
    pass."""

    def again(self, model: Any) -> int:
        """Count the operations that the model's activation checkpointing adds."""
        encoder = getattr(model, "backbone", model)
        return sum(flops for number, flops in self.blocks if encoder.recomputes(number))


def blank_images(model: Any, number: int) -> torch.Tensor:
    """Make images uint8 [number, C, H, W] of the size that the model takes, on its device."""
    encoder = getattr(model, "backbone", model)
    height, width = encoder.patch_embed.img_size
    device = next(model.parameters()).device
    return torch.zeros(number, encoder.in_chans, height, width, dtype=torch.uint8, device=device)


def count_flops(model: Any, trial_loss: TrialLoss) -> Flops:
    """Count the operations of training on an image.

    A backward pass takes twice as many as the forward pass: one product for the gradient of the
    weights, and one for that of the input. The images need no gradient, which saves the patch
    embedding one product. Frozen blocks, and frozen attention below a trained MLP, have a forward
    pass only.

    Args:
        model: model on the meta device, with its frozen parameters set.
        trial_loss: function that computes the loss of the model for images.
    """
    images = blank_images(model, 2)  # batch norm needs two values of a channel
    with torch.no_grad(), torch.device("meta"), FlopCounterMode(display=False) as counter:
        trial_loss(model, images)
    counts = {name: sum(ops.values()) // 2 for name, ops in counter.get_flop_counts().items()}
    encoder = getattr(model, "backbone", model)
    total, blocks = 3 * counts["Global"], []
    for name, flops in counts.items():
        found = re.search(r"\.(blocks|decoder_blocks)\.(\d+)(?:\.(attn|mlp))?$", name)
        if name.endswith(".patch_embed.proj"):
            total -= flops if encoder.patch_embed.proj.weight.requires_grad else 2 * flops
        elif found:
            block = getattr(encoder, found[1])[int(found[2])]
            part = getattr(block, found[3]) if found[3] else block
            trained = any(p.requires_grad for p in part.parameters())
            if found[3]:
                total -= 0 if trained else 2 * flops
            elif trained:
                blocks.append((int(found[2]), flops))
    return Flops(total, tuple(blocks))
