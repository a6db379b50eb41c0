"""Errors that get one line on stderr instead of a traceback."""


class UserError(Exception):
    """Bad input, exit code 2. The message says what is wrong, where, and what would be right."""


class RunError(Exception):
    """A run that cannot go on though the program is right, exit code 1: bad data, a NaN loss."""


class CommonError(RunError):
    """One that is raised on all ranks alike, so that they end together and it is said once."""
