"""The one exception whose message is written for the person who started a run."""


class RunError(Exception):
    """A run cannot start or go on. The message says why and what to do; nothing was lost."""
