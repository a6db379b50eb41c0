#!/usr/bin/env python3
"""Make WebDataset tars that others wrote usable: `mae-scale index`."""

from __future__ import annotations

import sys

from mae_scale.launch.outputs import one_line, take_over


def main(argv: list[str] | None = None) -> int:
    """Run the command `index` and return its exit code."""
    from mae_scale.commands.index import main as command
    from mae_scale.errors import RunError, UserError

    try:
        return command(sys.argv[1:] if argv is None else argv, "index_shards.py")
    except UserError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; nothing has been written", file=sys.stderr)
        return 130


if __name__ == "__main__":
    take_over()
    sys.exit(main())
