"""The one exception that means "the input is at fault, not the program"."""

__all__ = ["UserError"]


class UserError(ValueError):
    """Bad input, told at the boundary: the value, what was expected, and how to mend it.

    The command line prints it as one message without a traceback and exits with 2. Library users catch a `ValueError`.
    """
