"""HTML and SVG elements. Text and attributes are escaped unless they are markup already."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

VOID = {"img", "meta", "link", "br"}


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def element(name: str, /, *children: str | None, **attributes: str | float | bool | None) -> Markup:
    """An element with children and attributes; None and False leave one out.

    An underscore in an attribute's name stands for a hyphen; one at its end is dropped.
    """
    opened = f"<{name}{''.join(_attribute(key, value) for key, value in attributes.items())}>"
    return Markup(opened if name in VOID else f"{opened}{joined(children)}</{name}>")


def joined(children: Iterable[str | None], between: str = "") -> Markup:
    """Children one after the other."""
    return Markup(
        between.join(
            child if isinstance(child, Markup) else escape(child)
            for child in children
            if child is not None
        )
    )


def number(value: float | None, decimals: int) -> str:
    """A number with so many decimals, or a dash."""
    return "–" if value is None else f"{value:.{decimals}f}"


def counted(count: int | None, noun: str) -> str:
    """Such as "1 step" or "2 steps"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _attribute(key: str, value: str | float | bool | None) -> str:
    if value is None or value is False:
        return ""
    key = key.removesuffix("_").replace("_", "-")
    return f" {key}" if value is True else f' {key}="{escape(_text(value))}"'


def _text(value: str | float) -> str:
    """A coordinate needs no more than a tenth of a pixel."""
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)
