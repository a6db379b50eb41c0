#!/usr/bin/env python3
"""Make WebDataset shards of ImageNet, or of any images: `mae-scale shard`."""

from __future__ import annotations

import os
import signal
import sys

from mae_scale.errors import STOPPED
from mae_scale.launch.outputs import one_line, take_over


def main(argv: list[str] | None = None) -> int:
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


def leave(*_: object) -> None:
    """End at once: nothing is written before the command handles these signals itself."""
    print("stopped; the same command starts again", file=sys.stderr)
    os._exit(STOPPED)


if __name__ == "__main__":
    take_over()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)
    sys.exit(main())
