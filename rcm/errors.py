"""Errors for the person who runs a command."""


class RunError(Exception):
    """A run cannot start or continue. The message says why and what to do; no data is lost."""


class OptionError(ValueError):
    """An option of a command is not allowed. The message says why; nothing was written."""
