"""Counter-based randomness: every random number of a run is a hash of its purpose and place.

Nothing random is state, so nothing random is saved: the order of an epoch, a crop or a mask
follows from keys such as (seed, epoch, sample) alone. The hash chains the finaliser of
splitmix64 (Steele et al., OOPSLA 2014) over the keys. It exists twice, here in numpy for the data
workers and in `models.randomness_torch` for the device, with the same bits. It uses integers only,
so that it gives the same values on any device and with any version of either library.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import numpy.typing as npt

GOLDEN = 0x9E3779B97F4A7C15
MUL1 = 0xBF58476D1CE4E5B9
MUL2 = 0x94D049BB133111EB

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
            h = h ^ (k + np.uint64(GOLDEN))
            h = (h ^ (h >> np.uint64(30))) * np.uint64(MUL1)
            h = (h ^ (h >> np.uint64(27))) * np.uint64(MUL2)
            h = h ^ (h >> np.uint64(31))
    return h


def uniform(*keys: IntLike) -> npt.NDArray[np.float64]:
    """Draw uniform float64 in [0, 1) (53 bits) of the broadcast shape of the keys."""
    return (hash64(*keys) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(n: int, *keys: IntLike) -> npt.NDArray[np.int64]:
    """Return the permutation of range(n), int64 [n], that follows from scalar keys."""
    return np.argsort(hash64(*keys, np.arange(n, dtype=np.uint64)), kind="stable")
