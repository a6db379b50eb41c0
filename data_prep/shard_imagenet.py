#!/usr/bin/env python3
"""Make WebDataset shards of ImageNet, or of any images: `mae-scale shard`."""

from __future__ import annotations

import sys

from mae_scale.launch.outputs import one_line, take_over
from mae_scale.launch.stopping import leave_before_start


def main(argv: list[str] | None = None) -> int:
    """Run the command `shard` and return its exit code."""
    from mae_scale.commands.shard import main as command
    from mae_scale.errors import RunError, UserError

    try:
        return command(sys.argv[1:] if argv is None else argv, "shard_imagenet.py")
    except UserError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    take_over()
    leave_before_start()  # until the command handles signals itself
    sys.exit(main())
