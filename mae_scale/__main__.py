"""Start of the command line by `python -m mae_scale`."""

from mae_scale.cli import entry

entry()
