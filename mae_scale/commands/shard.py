"""Make WebDataset shards of ImageNet, or of any images that one has.

SRC may hold ImageNet's official archives (not unpacked), the Kaggle layout, class folders, tars of
classes, or Hugging Face's parquet files. The images keep their bytes. If it is stopped, at whatever
moment, the same command goes on. OUT takes one split.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
from collections import Counter
from pathlib import Path

from mae_scale.commands.arguments import Parser
from mae_scale.errors import RunError, UserError
from mae_scale.launch.stopping import leave_before_start


def size(text: str) -> int:
    """Read a number of bytes from a text such as 256MB.

    Raises:
        argparse.ArgumentTypeError: the text is no size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]?)B?", text)
    if not match or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 256MB or 1GB")
    return int(float(match[1]) * 1000 ** " kMGT".index(match[2] or " "))


def positive(text: str) -> int:
    """Read a whole number above 0.

    Raises:
        argparse.ArgumentTypeError: the text is no such number.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def share(text: str) -> float:
    """Read a number between 0 and 1.

    Raises:
        argparse.ArgumentTypeError: the text is no such number.
    """
    try:
        if 0 < (value := float(text)) < 1:
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is no number between 0 and 1")


def parser(prog: str) -> Parser:
    """Describe the arguments."""
    parser = Parser(prog=prog, description=__doc__)
    add = parser.add_argument
    add("src", metavar="SRC", help="folder of archives, class folders, tars or parquet files")
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
    add(
        "--max-pixels",
        type=positive,
        help="larger images are left out as damaged (default: 178956970)",
    )
    what = parser.add_argument_group("which images, and what their classes are")
    what.add_argument(
        "--list",
        metavar="FILE",
        help="take only the images of this list, a path a line, with a label behind it or without",
    )
    what.add_argument(
        "--classes",
        metavar="FILE_OR_SHARDS",
        help="take only these classes, numbered as in this list (one a line) or folder of shards",
    )
    what.add_argument(
        "--class-depth",
        type=positive,
        metavar="N",
        help="the class is the first N folders of a path (default: found by looking)",
    )
    what.add_argument(
        "--val-share",
        type=share,
        metavar="SHARE",
        help="split a source without split folders: this share of each class is val, by --seed",
    )
    add("--dry-run", action="store_true", help="say what would be written, and free space")
    add("--num-tasks", type=positive, default=1, help="split the shards over a Slurm array")
    add("--task-index", type=int, default=0, help="this task, from 0")
    return parser


def parse(argv: list[str], prog: str) -> argparse.Namespace:
    """Parse the arguments.

    Raises:
        UserError: the arguments are wrong, or do not fit each other.
    """
    args = parser(prog).parse_args(argv)
    if args.quality is not None and args.resize_short is None:
        raise UserError("--quality has an effect only with --resize-short")
    if args.quality is not None and args.quality > 95:
        raise UserError(f"--quality {args.quality} is above 95")
    if not 0 <= args.task_index < args.num_tasks:
        raise UserError(
            f"--task-index {args.task_index} is outside 0 to {args.num_tasks - 1} (--num-tasks)"
        )
    return args


def main(argv: list[str], prog: str) -> int:
    """Parse the arguments, write the shards, and return 0 (done) or 85 (stopped by a signal).

    Raises:
        UserError: the input is wrong; nothing has been written.
        RunError: there is no room, or a file could not be read or written.
    """
    before = leave_before_start()
    try:
        args = parse(argv, prog)
        from mae_scale.data.formats import MAX_PIXELS
        from mae_scale.data.preview import PREVIEW
        from mae_scale.data.shards import MANIFEST, read_manifest
        from mae_scale.sharding.lists import read_classes
        from mae_scale.sharding.look import look
        from mae_scale.sharding.plan import Options
        from mae_scale.sharding.run import shard
        from mae_scale.sharding.sources import Choice

        options = Options(
            split=args.split,
            seed=args.seed,
            samples_per_shard=args.samples_per_shard,
            shard_size=args.shard_size,
            resize_short=args.resize_short,
            quality=args.quality or 90,
            max_pixels=args.max_pixels or MAX_PIXELS,
        )
        choice = Choice(
            list_file=args.list,
            classes=read_classes(args.classes) if args.classes else None,
            class_depth=args.class_depth,
            val_share=args.val_share,
            seed=args.seed,
        )
        code = shard(
            args.src,
            args.out,
            options,
            choice=choice,
            workers=args.workers,
            num_tasks=args.num_tasks,
            task_index=args.task_index,
            dry_run=args.dry_run,
        )
        out = Path(args.out)
        if not (code or args.dry_run or (out / PREVIEW).exists()) and (out / MANIFEST).exists():
            look(out, Counter(why for _, why in read_manifest(out)["made_by"]["damaged"]))
        return code
    except RunError as error:
        raise RunError(f"{error}; the same command goes on from here") from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
