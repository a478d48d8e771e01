"""The output of a run: a picture of samples side by side, and a table of scores."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from einops import rearrange
from torch import Tensor
from torch.nn import functional

from rcm.evaluation.evaluator import Row
from rcm.training.files import write_atomically


def save_grid(
    path: Path, panels: dict[str, Tensor], rows: int, *, black: float, white: float
) -> None:
    """Draw panels of images (n, 1 or 3, height, width) side by side, filled row by row, as a PNG.

    black and white are the values that are drawn so in all panels, gray or red, green and blue.
    """
    from matplotlib.figure import Figure  # imported late: it is slow, and only grids need it

    pictures = {
        title: _tiled(((images.cpu() - black) / (white - black)).clamp(0, 1), rows)
        for title, images in panels.items()
    }
    height, width, _ = next(iter(pictures.values())).shape
    inches = 0.42 * rows
    figure = Figure(
        figsize=((inches * width / height + 0.1) * len(panels), inches + 0.5), layout="constrained"
    )
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, picture) in zip(axes, pictures.items(), strict=True):
        axis.imshow(picture.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axis.set_title(title, fontsize=11)
        axis.set_axis_off()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    write_atomically(path, buffer.getvalue())


def _tiled(images: Tensor, rows: int) -> Tensor:
    """One picture (height, width, channels) of images, each with a white margin of one pixel."""
    tiles = functional.pad(images, (1, 1, 1, 1), value=1.0)
    return rearrange(tiles, "(rows columns) c h w -> (rows h) (columns w) c", rows=rows)


def table(rows: Mapping[str, Row]) -> str:
    """A Markdown table with a title for each row."""
    lines = [
        "| samples | evaluations | FD ↓ | label agreement ↑ | precision ↑ | recall ↑ "
        "| RMSE to teacher ↓ | diversity | of teacher's |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for title, row in rows.items():
        s, evaluations = row.scores, row.source.evaluations
        lines.append(
            f"| {title} | {'–' if evaluations is None else evaluations} "
            f"| {s.frechet_distance:.2f} | {s.label_agreement:.3f} "
            f"| {s.precision:.3f} | {s.recall:.3f} | {_decimals(s.same_noise_rmse)} "
            f"| {s.diversity:.3f} | {_decimals(s.diversity_ratio)} |"
        )
    return "\n".join(lines)


def _decimals(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def save_report(folder: Path, rows: Mapping[str, Row], facts: Mapping[str, Any]) -> None:
    """Write report.md and report.json."""
    write_atomically(folder / "report.md", (table(rows) + "\n").encode())
    content = {**facts, "scores": {title: row.scores.as_dict() for title, row in rows.items()}}
    write_atomically(folder / "report.json", json.dumps(content, indent=2).encode())
