"""Writes the tables of docs/composition.md from the rows of the tests:

python -m tests.jvp_attn.composition_table
"""

from __future__ import annotations

import re
from pathlib import Path
from textwrap import fill

from tests.jvp_attn.composition import OTHER_USES, ROWS, UNSUPPORTED
from tests.jvp_attn.composition_features import FEATURES

PAGE = Path(__file__).parents[2] / "docs" / "composition.md"
BETWEEN_MARKERS = re.compile(r"(?<=composition_table -->\n).*(?=<!-- end -->\n)", re.DOTALL)


def mark(exact: bool) -> str:
    return "✓" if exact else "raises"


def tables() -> str:
    features = [f for f in FEATURES if not f.is_tangent]
    tangents = [f for f in FEATURES if f.is_tangent]
    rows = [
        (row.use, *(mark(all(map(row.composes_with, fs))) for fs in (features, tangents)))
        for row in ROWS
    ]
    rows += [(row.use, mark(False), mark(False)) for row in UNSUPPORTED]
    return "\n".join(
        [
            "",
            fill(f"Features: {', '.join(f.name for f in features)}.", 100),
            "",
            f"| use of PyTorch | every feature | {', '.join(f.name for f in tangents)} |",
            "|---|---|---|",
            *(f"| {' | '.join(row)} |" for row in rows),
            "",
            "| use of PyTorch | some features |",
            "|---|---|",
            *(f"| {row.use} | {mark(row.exact)} |" for row in OTHER_USES),
            "",
            "",
        ]
    )


def with_tables(page: str) -> str:
    """The page with the tables between its markers."""
    text, count = BETWEEN_MARKERS.subn(lambda _: tables(), page)
    if count != 1:
        raise ValueError(f"{PAGE} must have one pair of markers, found {count}")
    return text


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text("utf-8")), "utf-8")
