"""Errors that get one line on stderr instead of a traceback, and the exit code of a stop."""

STOPPED = 85  # exit code: stopped early, start me again (the number of ERESTART)


class UserError(Exception):
    """Bad input, exit code 2. The message says what is wrong, where, and what would be right."""

    on_all_ranks = False
    """Whether every rank of the process group has raised the same."""


class RunError(Exception):
    """A run that cannot go on though the program is right, exit code 1: bad data, a NaN loss."""


class CommonError(RunError):
    """One that is raised on all ranks alike, so that they end together and it is said once."""
