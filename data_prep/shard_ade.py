#!/usr/bin/env python3
"""Make WebDataset shards of ADE20K, or of any images with masks in its layout.

SRC is ADEChallengeData2016, with {images,annotations}/{training,validation}. Each sample is
<name>.jpg with <name>.seg.png, whose values are the original ones: 0 is no class. After an
interruption at any moment the same command goes on. OUT takes one split.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mae_scale.errors import UserError
from mae_scale.launch.outputs import take_over
from mae_scale.sharding.annotated_script import Find, run

if TYPE_CHECKING:
    from mae_scale.sharding.sources import Source


def listed(src: Path, split: str, workers: int) -> Source:
    """List the images of a split.

    Raises:
        UserError: `src` has another layout.
    """
    from mae_scale.sharding.ade import find_ade

    found = find_ade(src, split, workers)
    if found is None:
        raise UserError(
            f"{src} has no folders images/ and annotations/ with training/ or validation/ in them"
        )
    return found


def source(args: argparse.Namespace) -> tuple[Path, Find]:
    """Return the folder of the images, and the function that lists them."""
    return args.src, listed


if __name__ == "__main__":
    take_over()
    sys.exit(run(None, __doc__ or "", {"src": "ADEChallengeData2016"}, source))
