"""Arguments of the commands that have no config."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from mae_scale.errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors are one line that the command line turns into exit code 2.

    Options are not abbreviated: one that joins later must not change what a script means.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raise the message as a `UserError`."""
        raise UserError(message)
