"""Errors that are the user's to mend: shown as one message, without a traceback."""


class UsageError(ValueError):
    """An option has a value that cannot be used."""
