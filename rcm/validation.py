"""Checks of settings. An error names the setting, its value and what is allowed.

Each function takes settings by name. It raises TypeError for a value of another type and ValueError
for one that is out of range.
"""

import math
from collections.abc import Iterable
from typing import Any

MAX_INTEGER = 2**31 - 1  # beyond any count of a run, and valid wherever PyTorch takes an integer
MAX_SEED = 2**63 - 1


def require_integer(low: int, high: int = MAX_INTEGER, /, **settings: int) -> None:
    """Require integers in [low, high]."""
    for name, value in settings.items():
        _require_type(isinstance(value, int), name, value, "an integer")
        _require(low <= value <= high, name, value, f"an integer in {low}..{high}")


def require_number(interval: str, low: float, high: float, /, **settings: float) -> None:
    """Require numbers in an interval: "()", "(]", "[)" or "[]" says which ends belong to it."""
    rule = f"a number in {interval[0]}{low:g}, {high:g}{interval[1]}"
    for name, value in settings.items():
        _require_type(isinstance(value, (int, float)), name, value, "a number")
        inside = low < value < high
        at_end = (value == low and interval[0] == "[") or (value == high and interval[1] == "]")
        _require(inside or at_end, name, value, rule)


def require_positive(**settings: float) -> None:
    """Require finite numbers above 0."""
    require_number("()", 0, math.inf, **settings)


def require_numbers(length: int | None, /, **settings: tuple[float, ...]) -> None:
    """Require tuples of numbers, of that length unless it is None."""
    rule = "a tuple of numbers" if length is None else f"a tuple of {length} numbers"
    for name, values in settings.items():
        numbers = isinstance(values, tuple) and all(isinstance(v, (int, float)) for v in values)
        _require_type(numbers, name, values, rule)
        _require(length in (None, len(values)), name, values, rule)


def require_choice(choices: Iterable[str], /, **settings: str) -> None:
    """Require one of the choices."""
    for name, value in settings.items():
        _require(value in choices, name, value, f"one of {', '.join(choices)}")


def _require_type(allowed: bool, name: str, value: Any, rule: str) -> None:
    if not allowed or isinstance(value, bool):  # a bool is an int in Python
        raise TypeError(f"{name} is {value!r}; it must be {rule}")


def _require(allowed: bool, name: str, value: Any, rule: str) -> None:
    if not allowed:
        raise ValueError(f"{name} is {value!r}; it must be {rule}")
