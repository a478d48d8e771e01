"""Errors for the person who runs a command."""


class RunError(Exception):
    """A run cannot start or continue. The message says why and what to do; no data is lost."""


def require_positive(**settings: float) -> None:
    """Raise ValueError, naming the setting, unless every value is positive."""
    for name, value in settings.items():
        if not value > 0:
            raise ValueError(f"{name} is {value}; it must be positive")
