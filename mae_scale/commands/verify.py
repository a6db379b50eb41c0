"""Check a folder of shards: sizes, SHA-256, tar structure, labels, and that every image decodes.

It exits with 0 and prints the counts, or it exits with 1 and names each damaged member.
"""

from __future__ import annotations

import os
import sys

from mae_scale.commands.arguments import Parser


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
    return parser


def main(argv: list[str], prog: str) -> int:
    """Parse the arguments, verify, and print what was found."""
    args = parser(prog).parse_args(argv)

    from mae_scale.data.remote import printable
    from mae_scale.sharding.verify import verify

    report = verify(args.out, fast=args.fast, workers=args.workers)
    for problem in report.problems:
        print(printable(problem), file=sys.stderr)
    if report.problems:
        print(f"{args.out}: {len(report.problems):,} problems", file=sys.stderr)
        return 1
    how = "not decoded" if args.fast else "all decode"
    print(
        f"{args.out}: intact: {report.samples:,} images ({how}) of {report.classes:,} classes "
        f"in {report.shards:,} shards"
    )
    return 0
