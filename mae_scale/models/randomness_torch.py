"""The hash of `mae_scale.randomness` in torch, for what is drawn on the device.

It is a module of its own, so that data can be written into shards without importing torch.
"""

from __future__ import annotations

import torch

from mae_scale.randomness import GOLDEN, MUL1, MUL2


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift int64 to the right logically (torch shifts arithmetically)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def hash64_torch(*keys: int | torch.Tensor) -> torch.Tensor:
    """Compute `hash64` on a device: int64 tensors whose bits are those of the uint64 values.

    At least one key must be an int64 tensor; it sets the device.
    """
    device = next(key.device for key in keys if isinstance(key, torch.Tensor))
    h = torch.zeros((), dtype=torch.int64, device=device)
    for key in keys:
        k = key if isinstance(key, torch.Tensor) else _signed(int(key))
        h = h ^ (k + _signed(GOLDEN))
        h = (h ^ _shift_right(h, 30)) * _signed(MUL1)
        h = (h ^ _shift_right(h, 27)) * _signed(MUL2)
        h = h ^ _shift_right(h, 31)
    return h


def uniform_torch(*keys: int | torch.Tensor) -> torch.Tensor:
    """Draw uniform float32 in [0, 1) (24 bits, exact) of the broadcast shape, on the keys' device.

    At least one key must be an int64 tensor; it sets the device.
    """
    return _shift_right(hash64_torch(*keys), 40).to(torch.float32) * 2.0**-24


def below_torch(limit: torch.Tensor | int, *keys: int | torch.Tensor) -> torch.Tensor:
    """Draw uniform int64 in [0, limit) of the broadcast shape, on the keys' device.

    It uses integers only, so that no device rounds differently.

    Args:
        limit: at most 2**24.
        keys: at least one of them an int64 tensor, which sets the device.
    """
    return (_shift_right(hash64_torch(*keys), 40) * limit) >> 24
