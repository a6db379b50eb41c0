"""Check a folder of shards: sizes, SHA-256, tar structure, labels, and that every image decodes.

It exits with 0 and prints the counts, or it exits with 1 and names each damaged member.
"""

from __future__ import annotations

import os
import sys

from mae_scale.commands.arguments import Parser
from mae_scale.errors import UserError


def parser(prog: str) -> Parser:
    """Describe the arguments."""
    parser = Parser(prog=prog, description=__doc__)
    parser.add_argument("out", metavar="OUT", help="folder of shards")
    parser.add_argument("--fast", action="store_true", help="don't decode the images")
    parser.add_argument(
        "--workers",
        type=int,
        default=min(16, len(os.sched_getaffinity(0))),
        help="processes (default: %(default)s)",
    )
    parser.add_argument(
        "--max-pixels",
        type=int,
        help="an image of more pixels counts as damaged (default: 178,956,970; up to the limit "
        "that the shards were made with, larger ones are not decoded, only compared)",
    )
    return parser


def main(argv: list[str], prog: str) -> int:
    """Parse the arguments, verify, and print what was found."""
    args = parser(prog).parse_args(argv)
    if args.max_pixels is not None and args.max_pixels < 1:
        raise UserError(f"--max-pixels {args.max_pixels} must be at least 1")

    from mae_scale.data.remote import printable
    from mae_scale.sharding.verify import verify

    report = verify(args.out, fast=args.fast, workers=args.workers, max_pixels=args.max_pixels)
    for problem in report.problems:
        print(printable(problem), file=sys.stderr)
    if report.problems:
        print(f"{args.out}: {len(report.problems):,} problems", file=sys.stderr)
        return 1
    how = "not decoded" if args.fast else "all decode"
    if report.allowed > report.max_pixels and not args.fast:
        how = (
            f"all of at most {report.max_pixels:,} pixels decode; --max-pixels {report.allowed} "
            "decodes larger ones, too"
        )
    print(
        f"{args.out}: intact: {report.samples:,} images ({how}) of {report.classes:,} classes "
        f"in {report.shards:,} shards"
    )
    return 0
