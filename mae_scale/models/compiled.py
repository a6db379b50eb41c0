"""Compiled transformer blocks: one graph serves all blocks of a shape, with drop path, too."""

from __future__ import annotations

import torch
from timm.layers import DropPath
from timm.models.vision_transformer import Block
from torch import nn


class GraphDropPath(nn.Module):
    """Stochastic depth whose rate is a tensor, so that blocks of all rates share a graph.

    timm's module keeps the rate as a number, which becomes part of the graph: each block would be
    compiled anew until torch gives up and leaves the rest as it is.

    Args:
        rate: share of the paths that are dropped, at least 0 and below 1.
    """

    rate: torch.Tensor

    def __init__(self, rate: float) -> None:
        super().__init__()
        self._rate = (rate,)  # in a tuple: torch.compile looks at a module's numbers
        self.register_buffer("rate", torch.tensor(rate), persistent=False)

    def reset_parameters(self) -> None:
        """Set the rate, whose value is missing in a model that was made on the meta device."""
        self.rate.fill_(self._rate[0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Set whole samples of [B, ...] to 0 in training, and scale up the others."""
        if not self.training:
            return x
        shape = (len(x),) + (1,) * (x.ndim - 1)
        kept = torch.rand(shape, device=x.device) >= self.rate
        return x * (kept / (1 - self.rate)).to(x.dtype)


def compile_blocks(model: nn.Module) -> None:
    """Compile the transformer blocks in place; state-dict keys stay as they are.

    Only what is within a block's hooks, where ZeRO-3 gathers and releases weights, is compiled.
    """
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for block in blocks:
        # If one block drops paths, all blocks get the module, the first one with a rate of 0: an
        # Identity in its place would need another graph.
        if any(isinstance(module, DropPath) for b in blocks for module in b.children()):
            device = next(block.parameters()).device
            for name in ("drop_path1", "drop_path2"):
                rate = getattr(getattr(block, name), "drop_prob", 0.0)
                setattr(block, name, GraphDropPath(rate).to(device))
        block.forward = torch.compile(block.forward, dynamic=False)  # type: ignore[method-assign]
