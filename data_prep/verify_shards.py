#!/usr/bin/env python3
"""Check a folder of shards: sizes, SHA-256, tar structure, labels, and that every image decodes.

Exits 0 and prints the counts, or 1 and names each damaged member.
"""

from __future__ import annotations

import argparse
import os
import sys


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("out", metavar="OUT", help="folder of shards")
    parser.add_argument("--fast", action="store_true", help="don't decode the images")
    parser.add_argument(
        "--workers",
        type=int,
        default=min(16, len(os.sched_getaffinity(0))),
        help="processes (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    from mae_scale.errors import RunError, UserError
    from mae_scale.sharding.verify import verify

    try:
        report = verify(args.out, fast=args.fast, workers=args.workers)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; nothing is known yet", file=sys.stderr)
        return 130
    for problem in report.problems:
        print(problem, file=sys.stderr)
    if report.problems:
        print(f"{args.out}: {len(report.problems):,} problems", file=sys.stderr)
        return 1
    how = "not decoded" if args.fast else "all decode"
    print(
        f"{args.out}: intact: {report.samples:,} images ({how}) of {report.classes:,} classes "
        f"in {report.shards:,} shards"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
