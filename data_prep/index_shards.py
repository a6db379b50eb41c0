#!/usr/bin/env python3
"""Make WebDataset tars that others wrote usable, without rewriting them.

Reads each tar once and writes manifest.json and an index, beside the tars or into --out.
Samples are images (.jpg, .jpeg, .png, .webp) with a label in .cls or .json.
"""

from __future__ import annotations

import argparse
import os
import sys


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add(
        "tars",
        metavar="TARS",
        nargs="+",
        help="a folder, tars, URLs or pipe: commands; braces are expanded: 'x-{000..127}.tar'",
    )
    add("--out", help="folder for the index (default: the folder of the tars)")
    add("--split", default="train", help="name of the split (default: %(default)s)")
    add("--label-key", help="key of the label in .json (default: label, cls, class or target)")
    add(
        "--workers",
        type=int,
        default=min(16, len(os.sched_getaffinity(0))),
        help="processes (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    from mae_scale.errors import RunError, UserError
    from mae_scale.sharding.foreign import index_shards

    try:
        folder, shards, samples, unlabelled = index_shards(
            args.tars,
            args.out,
            split=args.split,
            label_key=args.label_key,
            workers=args.workers,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; nothing has been written", file=sys.stderr)
        return 130
    labels = f"; {unlabelled:,} have no label" if unlabelled else ""
    print(f"{folder}: {samples:,} images in {shards:,} shards{labels}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
