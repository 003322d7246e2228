"""The exception that means "the input is at fault, not the program", and the kind of it that damaged files raise."""

__all__ = ["DamagedError", "UserError"]


class UserError(ValueError):
    """Bad input, told at the boundary: the value, what was expected, and how to mend it.

    The command line prints it as one message without a traceback and exits with 2. Library users catch a `ValueError`.
    """


class DamagedError(UserError):
    """A file does not hold what was written into it."""
