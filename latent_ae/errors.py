"""The one error that a person, not a programmer, is meant to read."""

__all__ = ["UserError"]


class UserError(ValueError):
    """Bad input, told in one sentence: what is wrong, where, and what to do about it.

    The command line prints it without a traceback and exits with code 2. It is a `ValueError`, so
    library users may catch it as one.
    """
