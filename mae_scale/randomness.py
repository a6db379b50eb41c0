"""Counter-based randomness: every random number of a run is a hash of its purpose and place.

Nothing random is state, so nothing random is saved: the order of an epoch, a crop or a mask
follows from keys such as (seed, epoch, sample) alone. The hash chains the finaliser of
splitmix64 (Steele et al., OOPSLA 2014) over the keys. It exists twice, in numpy for the data
workers and in torch for the device, with the same bits. It uses integers only, so that it gives
the same values on any device and with any version of either library.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import numpy.typing as npt
import torch

_GOLDEN = 0x9E3779B97F4A7C15
_MUL1 = 0xBF58476D1CE4E5B9
_MUL2 = 0x94D049BB133111EB

IntLike = int | np.integer | npt.NDArray[np.integer]


class Purpose(IntEnum):
    """First key of every hash, so that no two uses share a stream.

    Never renumber: the random numbers of all runs would change.
    """

    SHARD_ORDER = 1
    WINDOW_ORDER = 2
    AUGMENT = 3
    MASK = 4
    DEVICE_SEED = 5
    REPLACEMENT = 6
    WRITE_ORDER = 7
    IMAGE_OPERATIONS = 8
    MIX = 9
    MASK_BLOCK = 10
    COLOR_JITTER = 11
    ANNOTATED_AUGMENT = 20


def hash64(*keys: IntLike) -> npt.NDArray[np.uint64]:
    """Hash integer keys, broadcast against each other, to uint64 of the broadcast shape."""
    h = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):
        for key in keys:
            k = np.asarray(key).astype(np.uint64)
            h = h ^ (k + np.uint64(_GOLDEN))
            h = (h ^ (h >> np.uint64(30))) * np.uint64(_MUL1)
            h = (h ^ (h >> np.uint64(27))) * np.uint64(_MUL2)
            h = h ^ (h >> np.uint64(31))
    return h


def uniform(*keys: IntLike) -> npt.NDArray[np.float64]:
    """Draw uniform float64 in [0, 1) (53 bits) of the broadcast shape of the keys."""
    return (hash64(*keys) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(n: int, *keys: IntLike) -> npt.NDArray[np.int64]:
    """Return the permutation of range(n), int64 [n], that follows from scalar keys."""
    return np.argsort(hash64(*keys, np.arange(n, dtype=np.uint64)), kind="stable")


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
        h = h ^ (k + _signed(_GOLDEN))
        h = (h ^ _shift_right(h, 30)) * _signed(_MUL1)
        h = (h ^ _shift_right(h, 27)) * _signed(_MUL2)
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
