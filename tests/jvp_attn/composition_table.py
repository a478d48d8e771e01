"""Writes README's tables of what composes, from the rows of the tests:

python tests/jvp_attn/composition_table.py
"""

from __future__ import annotations

import re
from pathlib import Path
from textwrap import fill

from tests.jvp_attn.composition import ELSEWHERE, REFUSALS, ROWS
from tests.jvp_attn.composition_features import FEATURES

README = Path(__file__).parents[2] / "README.md"
BETWEEN_MARKERS = re.compile(r"(?<=composition_table.py -->\n).*(?=<!-- end -->\n)", re.DOTALL)


def mark(exact: bool) -> str:
    return "✓" if exact else "raises"


def tables() -> str:
    features = [f for f in FEATURES if not f.is_tangent]
    tangents = [f for f in FEATURES if f.is_tangent]
    rows = [
        (row.use, *(mark(all(map(row.composes_with, fs))) for fs in (features, tangents)))
        for row in ROWS
    ]
    rows += [(row.use, mark(False), mark(False)) for row in REFUSALS]
    return "\n".join(
        [
            "",
            fill(f"Features: {', '.join(f.name for f in features)}.", 100),
            "",
            f"| | each feature | {', '.join(f.name for f in tangents)} |",
            "|---|---|---|",
            *(f"| {' | '.join(row)} |" for row in rows),
            "",
            "| | some features |",
            "|---|---|",
            *(f"| {row.use} | {mark(row.exact)} |" for row in ELSEWHERE),
            "",
            "",
        ]
    )


def with_tables(readme: str) -> str:
    """The text with the tables between its markers."""
    text, found = BETWEEN_MARKERS.subn(lambda _: tables(), readme)
    if found != 1:
        raise ValueError(f"{README} has {found} places for the tables, not one")
    return text


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text("utf-8")), "utf-8")
