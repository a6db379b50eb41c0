#!/usr/bin/env python3
"""Make WebDataset shards of COCO, or of any images with a file of instances in COCO's form.

Each sample is <image id>.jpg with <image id>.json, which holds the original annotations. After an
interruption at any moment the same command goes on. OUT takes one split.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mae_scale.launch.outputs import take_over
from mae_scale.sharding.annotated_script import Find, run


def source(args: argparse.Namespace) -> tuple[Path, Find]:
    """Return the folder of the images, and the function that lists them."""
    from mae_scale.sharding.coco import read_coco

    return args.images, lambda *_: read_coco(args.instances, args.images)


if __name__ == "__main__":
    take_over()
    places = {
        "instances": "COCO's file, such as annotations/instances_train2017.json",
        "images": "folder of its images, such as train2017",
    }
    sys.exit(run(None, __doc__ or "", places, source))
