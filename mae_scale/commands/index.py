"""Make WebDataset tars that others wrote usable, without rewriting them.

It reads each tar once and writes manifest.json and an index, beside the tars or into --out. Samples
are images with a label in .cls or .json; those that are left out are counted and named.
"""

from __future__ import annotations

import os

from mae_scale.commands.arguments import Parser
from mae_scale.data.formats import MAX_PIXELS


def parser(prog: str) -> Parser:
    """Describe the arguments."""
    parser = Parser(prog=prog, description=__doc__)
    add = parser.add_argument
    add(
        "tars",
        metavar="TARS",
        nargs="+",
        help="a folder, tars, URLs or pipe: commands; braces are expanded: 'x-{000..127}.tar'",
    )
    add("--out", help="folder for the index (default: the folder of the tars)")
    add("--split", default="train", help="name of the split (default: %(default)s)")
    add("--pattern", help="take only the tars of this name, such as 'imagenet1k-train-*.tar'")
    add("--label-key", help="key of the label in .json (default: label, cls, class or target)")
    add("--image-key", help="which image of a sample, where it has several: input.jpg")
    add(
        "--classes",
        metavar="FILE_OR_SHARDS",
        help="number the classes as this list (one a line) or folder of shards does",
    )
    add(
        "--max-pixels",
        type=int,
        default=MAX_PIXELS,
        help="leave larger images out (default: %(default)s)",
    )
    add(
        "--workers",
        type=int,
        default=min(16, len(os.sched_getaffinity(0))),
        help="processes (default: %(default)s)",
    )
    return parser


def main(argv: list[str], prog: str) -> int:
    """Parse the arguments, index, and say what the index holds."""
    args = parser(prog).parse_args(argv)

    from mae_scale.sharding.foreign import index_shards
    from mae_scale.sharding.lists import read_classes
    from mae_scale.sharding.look import look

    report = index_shards(
        args.tars,
        args.out,
        split=args.split,
        pattern=args.pattern,
        label_key=args.label_key,
        image_key=args.image_key,
        classes=read_classes(args.classes) if args.classes else None,
        max_pixels=args.max_pixels,
        workers=args.workers,
    )
    labels = f"; {report.unlabelled:,} have no label" if report.unlabelled else ""
    left_out = f"; {report.left_out:,} were left out" if report.left_out else ""
    print(
        f"{report.folder}: {report.samples:,} images in {report.shards:,} shards{labels}{left_out}"
    )
    if report.reads_with:
        print(
            "commands and addresses are taken from what you type: give data.train as "
            f"FOLDER+COMMAND, with {{}} in the place of a tar's name: {report.reads_with}"
        )
    look(report.folder, report.reasons, report.open_with)
    return 0
