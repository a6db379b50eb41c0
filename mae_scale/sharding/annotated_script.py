"""The command line that the scripts for annotated sets in data_prep/ share."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mae_scale.errors import RunError, UserError
from mae_scale.launch.outputs import one_line
from mae_scale.launch.stopping import leave_before_start

Find = Callable[[Path, str, int], Any]  # lists the images of (src, split, workers) as a Source


def run(
    argv: list[str] | None,
    about: str,
    places: dict[str, str],
    find: Callable[[argparse.Namespace], tuple[Path, Find]],
) -> int:
    """Parse the arguments, write the shards, and return the exit code.

    Args:
        argv: arguments of the command line; None: those of the process.
        about: description of the script for its help.
        places: names of the path arguments for the source, each with its help.
        find: function that returns, for the parsed arguments, the folder of the images and the
            function that lists them.
    """
    leave_before_start()  # until `shard` handles signals itself
    parser = argparse.ArgumentParser(description=about, allow_abbrev=False)
    for name, text in places.items():
        parser.add_argument(name, type=Path, metavar=name.upper(), help=text)
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for the shards of this split")
    parser.add_argument("--split", required=True, choices=["train", "val"])
    parser.add_argument(
        "--workers", type=int, default=min(16, len(os.sched_getaffinity(0))),
        help="writer processes; the result does not depend on them (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the order of the images")
    parser.add_argument("--samples-per-shard", type=int, metavar="N", help="default: 256 MB each")
    parser.add_argument("--dry-run", action="store_true", help="say what would be written")
    args = parser.parse_args(argv)
    for option in ("workers", "samples_per_shard"):
        if getattr(args, option) is not None and getattr(args, option) < 1:
            parser.error(f"--{option.replace('_', '-')} must be at least 1")

    from mae_scale.sharding.plan import Options
    from mae_scale.sharding.run import shard

    options = Options(args.split, seed=args.seed, samples_per_shard=args.samples_per_shard)
    try:
        src, lists = find(args)
        return shard(src, args.out, options, workers=args.workers, dry_run=args.dry_run, find=lists)
    except UserError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"error: {one_line(error)}; the same command goes on from here", file=sys.stderr)
        return 1
