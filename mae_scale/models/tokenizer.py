"""A tokenizer that gives each patch an id: the target "tokens" of the paper's Table 1d.

The paper takes the dVAE encoder of DALL-E (arXiv 2102.12092), as BEiT does. Here it is read
from a file: any TorchScript module, or the weights of DALL-E's encoder as safetensors.
"""

from __future__ import annotations

import math
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from mae_scale.errors import UserError
from mae_scale.files import require_file
from mae_scale.models.numerics import full_fp32

_GROUPS = 4  # number of groups of the dVAE encoder's blocks, with a pooling between two groups
_LOGIT_LAPLACE_EPS = 0.1  # DALL-E's value: it maps pixels to the range 0.1 to 0.9


class Tokenizer:
    """A tokenizer, which computes the ids of patches in fp32, without gradients.

    The images are resized so that the tokenizer gives one id to each patch. DALL-E's gives one id
    to 8 x 8 pixels: for 14 x 14 patches, images of 224 pixels are resized to 112.

    Args:
        path: a TorchScript module (.pt) that maps float32 [B, 3, S, S] in [0, 1] to logits
            [B, V, s, s] or int64 ids [B, s, s] or [B, s * s]; or a .safetensors of DALL-E's dVAE
            encoder with its own keys.
        img_size: pixels of a side of the images.
        num_patches: number of patches of an image, L.
        vocabulary_size: number of different ids, V.

    Raises:
        UserError: there is no such file, it is no tokenizer, or it does not fit.
    """

    def __init__(self, path: str | Path, img_size: int, num_patches: int, vocabulary_size: int):
        self._path, self._vocabulary_size = Path(path), vocabulary_size
        self._module = _load(self._path)
        self._grid = math.isqrt(num_patches)
        own = self._ids(torch.full((1, 3, img_size, img_size), 0.5)).shape[-1]
        if img_size % own:
            raise self._unfit(f"gives {own} x {own} ids of an image of {img_size} pixels")
        self._size = self._grid * (img_size // own)
        found = self._ids(torch.full((1, 3, self._size, self._size), 0.5)).shape[-1]
        if found != self._grid:
            raise self._unfit(
                f"gives {found} x {found} ids of an image of {self._size} pixels, expected "
                f"{self._grid} x {self._grid}, one for each patch"
            )

    def to(self, device: torch.device) -> Tokenizer:
        """Move the tokenizer to a device."""
        self._module.to(device)
        return self

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Compute the ids int64 [B, L] of images uint8 [B, 3, img_size, img_size]."""
        pixels, size = images.float() / 255, (self._size, self._size)
        if images.shape[-1] != self._size:
            pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 1)
        return self._ids(pixels).flatten(1)

    @torch.no_grad()
    def _ids(self, pixels: torch.Tensor) -> torch.Tensor:
        """Compute ids int64 [B, s, s] from float32 [B, 3, S, S] in [0, 1]."""
        try:
            with full_fp32():
                out = self._module(pixels)
        except RuntimeError as error:  # TorchScript raises it whatever is wrong
            last = str(error).strip().splitlines()[-1]
            raise self._unfit(f"fails on images {list(pixels.shape)}: {last}") from None
        if not isinstance(out, torch.Tensor):
            raise self._unfit(f"gives a {type(out).__name__}, expected a tensor")
        if out.is_floating_point():
            if out.ndim != 4 or out.shape[1] != self._vocabulary_size:
                raise self._unfit(
                    f"gives logits {list(out.shape)}, expected [B, {self._vocabulary_size}, s, s] "
                    "(vocabulary_size is the second)"
                )
            return out.argmax(dim=1)
        side = math.isqrt(out[0].numel())
        if len(out) != len(pixels) or side**2 != out[0].numel():
            raise self._unfit(f"gives ids {list(out.shape)}, expected [B, s, s] or [B, s * s]")
        if not pixels.is_cuda and not 0 <= int(out.min()) <= int(out.max()) < self._vocabulary_size:
            raise self._unfit(
                f"gives ids from {int(out.min())} to {int(out.max())}, but vocabulary_size "
                f"is {self._vocabulary_size}"
            )
        return out.long().view(len(out), side, side)

    def _unfit(self, what: str) -> UserError:
        return UserError(f"tokenizer {self._path} {what}")


def _load(path: Path) -> nn.Module:
    if not path.is_file():
        raise UserError(
            f"tokenizer: there is no file {path}; the target tokens needs a TorchScript "
            "module (.pt) or the weights of DALL-E's dVAE encoder (.safetensors)"
        )
    try:
        require_file(path)
        if path.suffix == ".safetensors":
            return DalleEncoder.from_state_dict(load_file(path), path).eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # deprecated, but users have such files
            return torch.jit.load(path, map_location="cpu").float().eval()
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"tokenizer {path} cannot be read as a tokenizer: {first}") from None


class _Conv(nn.Module):
    """A convolution that keeps the size, with the names that DALL-E gives to its parameters."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(outputs, inputs, kernel, kernel))
        self.b = nn.Parameter(torch.empty(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.w, self.b, padding=self.w.shape[-1] // 2)


class _Block(nn.Module):
    """A residual block of four convolutions, each after a ReLU."""

    def __init__(self, inputs: int, outputs: int, gain: float) -> None:
        super().__init__()
        hidden = outputs // 4
        sizes = [
            (inputs, hidden, 3),
            (hidden, hidden, 3),
            (hidden, hidden, 3),
            (hidden, outputs, 1),
        ]
        self.res_path = nn.ModuleDict(
            {f"conv_{i}": _Conv(*size) for i, size in enumerate(sizes, start=1)}
        )
        self.id_path = nn.Identity() if inputs == outputs else _Conv(inputs, outputs, 1)
        self._gain = gain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for conv in self.res_path.values():
            y = conv(F.relu(y))
        return self.id_path(x) + self._gain * y


class DalleEncoder(nn.Module):
    """The encoder of DALL-E's discrete VAE (arXiv 2102.12092, appendix A).

    It has a 7 x 7 convolution; four groups of residual blocks, of 1, 2, 4 and 8 times the width,
    with max-pooling between them; and a 1 x 1 convolution to the logits of the ids.

    Args:
        width: number of channels of the first group.
        blocks: number of blocks of each group.
        vocabulary_size: number of different ids, V.
    """

    def __init__(self, width: int = 256, blocks: int = 2, vocabulary_size: int = 8192) -> None:
        super().__init__()
        gain = 1 / (_GROUPS * blocks) ** 2
        self.blocks = nn.ModuleDict({"input": _Conv(3, width, 7)})
        before = width
        for group in range(_GROUPS):
            after = width * 2**group
            self.blocks[f"group_{group + 1}"] = nn.ModuleDict(
                {
                    f"block_{i + 1}": _Block(after if i else before, after, gain)
                    for i in range(blocks)
                }
            )
            before = after
        self.blocks["output"] = nn.ModuleDict({"conv": _Conv(before, vocabulary_size, 1)})

    @classmethod
    def from_state_dict(cls, state: dict[str, torch.Tensor], path: Path) -> DalleEncoder:
        """Build the encoder with the sizes of its weights.

        Raises:
            UserError: the weights are not those of such an encoder.
        """
        numbers = [re.match(r"blocks\.group_1\.block_(\d+)\.", key) for key in state]
        blocks = max((int(found[1]) for found in numbers if found), default=0)
        ends = ("blocks.input.w", "blocks.output.conv.w")
        if not blocks or not state.keys() >= set(ends):
            some = ", ".join(sorted(state)[:3])
            raise UserError(
                f"tokenizer {path} holds no dVAE encoder of DALL-E: expected keys such as "
                f"{ends[0]} and blocks.group_1.block_1.…, found {some}"
            )
        with torch.device("meta"):
            model = cls(len(state[ends[0]]), blocks, len(state[ends[1]]))
        model.load_state_dict(state, assign=True)
        return model.float()

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Compute logits [B, V, S / 8, S / 8] from float32 [B, 3, S, S] in [0, 1]."""
        parts: Any = self.blocks
        x = parts["input"]((1 - 2 * _LOGIT_LAPLACE_EPS) * pixels + _LOGIT_LAPLACE_EPS)
        for group in range(_GROUPS):
            for block in parts[f"group_{group + 1}"].values():
                x = block(x)
            if group + 1 < _GROUPS:
                x = F.max_pool2d(x, 2)
        return parts["output"]["conv"](F.relu(x))
