#!/usr/bin/env python3
"""Make WebDataset shards of ImageNet, or of any folder of class folders.

SRC may hold the official archives (not unpacked), the Kaggle layout, or class folders. The
images keep their bytes. Stopped at any moment, the same command goes on. OUT takes one split.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys

from mae_scale.errors import STOPPED


def size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]?)B?", text)
    if not match or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 256MB or 1GB")
    return int(float(match[1]) * 1000 ** " kMGT".index(match[2] or " "))


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add(
        "src", metavar="SRC", help="folder of the official archives, Kaggle layout or class folders"
    )
    add("out", metavar="OUT", help="folder for the shards of this split, new or begun before")
    add("--split", required=True, choices=["train", "val"])
    add(
        "--workers",
        type=positive,
        default=min(16, len(os.sched_getaffinity(0))),
        help="writer processes; the result does not depend on them (default: %(default)s)",
    )
    add("--seed", type=int, default=0, help="of the order of the images (default: %(default)s)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--samples-per-shard", type=positive, metavar="N")
    length.add_argument(
        "--shard-size", type=size, default="256MB", help="about this much (default: %(default)s)"
    )
    add(
        "--resize-short",
        type=positive,
        metavar="PIXELS",
        help="shrink images whose short side is longer, and encode them as JPEG",
    )
    add("--quality", type=positive, help="of resized JPEGs, 1 to 95 (default: 90)")
    add("--dry-run", action="store_true", help="say what would be written, and free space")
    add("--num-tasks", type=positive, default=1, help="split the shards over a Slurm array")
    add("--task-index", type=int, default=0, help="this task, from 0")
    args = parser.parse_args(argv)
    if args.quality is not None and args.resize_short is None:
        parser.error("--quality has an effect only with --resize-short")
    if args.quality is not None and args.quality > 95:
        parser.error(f"--quality {args.quality} is above 95")
    if not 0 <= args.task_index < args.num_tasks:
        parser.error(
            f"--task-index {args.task_index} is outside 0 to {args.num_tasks - 1} (--num-tasks)"
        )
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    from mae_scale.errors import RunError, UserError
    from mae_scale.sharding.plan import Options
    from mae_scale.sharding.run import shard

    options = Options(
        split=args.split,
        seed=args.seed,
        samples_per_shard=args.samples_per_shard,
        shard_size=args.shard_size,
        resize_short=args.resize_short,
        quality=args.quality or 90,
    )
    try:
        return shard(
            args.src,
            args.out,
            options,
            workers=args.workers,
            num_tasks=args.num_tasks,
            task_index=args.task_index,
            dry_run=args.dry_run,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"error: {error}; the same command goes on from here", file=sys.stderr)
        return 1


def leave(*_: object) -> None:
    """End at once. Until `shard` takes the signals over nothing is written."""
    print("stopped; the same command starts again", file=sys.stderr)
    os._exit(STOPPED)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)
    sys.exit(main())
