"""Errors that get one line on stderr instead of a traceback, and the exit code of a stop."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

STOPPED = 85  # exit code: stopped early, start me again (the number of ERESTART)


class UserError(Exception):
    """An error in what the user gave; it ends the program with exit code 2.

    The message is one line. It says what is wrong, where, and what would be right.
    """

    on_all_ranks = False
    """Whether every rank of the process group has raised the same error."""


class RunError(Exception):
    """An error that ends a run although the user's input is right: bad data, a loss that is NaN.

    It ends the program with exit code 1.
    """


class CommonError(RunError):
    """A `RunError` that all ranks raise alike: they end together, and rank 0 alone prints it."""


def did_you_mean(word: str, known: Iterable[str], otherwise: str = "", cutoff: float = 0.5) -> str:
    """Give a hint for the end of a message: the known word that is nearest to a mistyped one.

    Args:
        word: the mistyped word.
        known: words that would be right.
        otherwise: the hint to give where no known word is near.
        cutoff: smallest similarity, from 0 to 1, at which a known word counts as near.
    """
    by_small = {key.lower(): key for key in known}
    near = difflib.get_close_matches(word.lower(), by_small, 1, cutoff=cutoff)
    return f"did you mean '{by_small[near[0]]}'?" if near else otherwise


@contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Let error messages name what the user wrote, such as config keys or options.

    The libraries below name their own arguments. A name with an underscore is replaced wherever it
    stands as a word. A name without one may be a word of the sentence, so it is replaced only
    where the message begins with it.

    Args:
        names: the text to write for each argument, by the argument's name.
    """
    try:
        yield
    except (UserError, RunError) as error:
        text = str(error)
        for name, other in names.items():
            start = "" if "_" in name else "^"
            text = re.sub(rf"{start}(?<![\w.-]){re.escape(name)}(?![\w.])", other, text)
        error.args = (text,)
        raise
