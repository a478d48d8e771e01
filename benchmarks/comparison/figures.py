"""The figure of quality against network evaluations, and the grid of samples."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import torch
from comparison.runner import Results
from comparison.samples import PER_CLASS, SEED
from comparison.studies import METHODS, teacher
from comparison.tables import STEPS, by_what, rows_of, runs_of, titles
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from torch import Tensor

PANELS = {
    "frechet_distance": "Fréchet distance ↓",
    "recall": "recall ↑",
    "label_agreement": "label agreement ↑",
}
MARKERS = "osD^vP*X<>ph"


def draw_quality(path: Path, results: Results, study: str, preset: str) -> None:
    """Each metric against network evaluations: mean and range over the seeds of each method.

    Seeds that diverged are left out, and so is the figure without a student or the teacher.
    """
    runs = runs_of(study)
    found = by_what(results, runs)
    titled = titles(runs, found)
    finished = {what: [seed for seed in seeds if seed["rows"]] for what, seeds in found.items()}
    methods = {what: seeds for what, seeds in finished.items() if seeds}
    result = results.find(teacher(preset))
    if not methods or result is None or not result["rows"]:
        return
    figure = Figure(figsize=(12.5, 4.4), layout="constrained")
    axes = figure.subplots(1, len(PANELS))
    for axis, (metric, title) in zip(axes, PANELS.items(), strict=True):
        _draw_teacher(axis, result, metric)
        for number, (method, seeds) in enumerate(methods.items()):
            values = [[rows_of(s, "student", steps)[0][metric] for s in seeds] for steps in STEPS]
            means = [mean(row) for row in values]
            low = [m - min(row) for m, row in zip(means, values, strict=True)]
            high = [max(row) - m for m, row in zip(means, values, strict=True)]
            axis.errorbar(
                [steps * 1.018 ** (number - len(methods) / 2) for steps in STEPS],
                means,
                yerr=[low, high],
                label=titled[method],
                color=f"C{number % 10}",
                marker=MARKERS[number % len(MARKERS)],
                markersize=5,
                linewidth=1,
                linestyle="-" if number < 10 else "--",
            )
        axis.set_xscale("log", base=2)
        if metric == "frechet_distance":
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("")
        axis.set_xlabel("network evaluations per sample")
        axis.set_xticks([1, 2, 4, 8, 16, 32, 64], ["1", "2", "4", "8", "16", "32", "64"])
        axis.set_title(title)
        axis.grid(alpha=0.25)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.savefig(path, dpi=110)


def _draw_teacher(axis: Any, result: dict[str, Any], metric: str) -> None:
    rows = [row for row in result["rows"] if row["network"] == "teacher"]
    evaluations = [row["evaluations"] for row in rows]
    values = [row[metric] for row in rows]
    axis.plot(evaluations, values, color="black", marker=".", linewidth=1.5, label="teacher")
    (real,) = (row for row in result["rows"] if row["network"] == "real")
    if real[metric] is not None:
        axis.axhline(real[metric], color="gray", linestyle=":", label="real data, half to half")


def draw_grid(path: Path, kept: dict[str, Tensor], study: str, preset: str) -> None:
    """Samples of every method with 1 and 4 steps beside data and teacher, from the same noise.

    Without samples there is no figure.
    """
    start = f"{study}/{preset}/"
    there = {name.split("/")[2] for name in kept if name.startswith(start)}
    methods = [method for method in METHODS[preset] if method in there]
    if not methods:
        return
    first = f"{start}{methods[0]}/{SEED}"
    columns = {"data": f"{first}/data", "teacher\n32 steps": f"{first}/teacher-32"}
    rows = {"1 step": "student-1", "4 steps": "student-4"}
    figure = Figure(
        figsize=(1.05 * (len(methods) + 2), 2.9 * len(rows) + 0.4), layout="constrained"
    )
    axes = figure.subplots(len(rows), len(methods) + 2, squeeze=False)
    for line, (label, panel) in zip(axes, rows.items(), strict=True):
        shown = columns | {m: f"{start}{m}/{SEED}/{panel}" for m in methods}
        for axis, (title, name) in zip(line, shown.items(), strict=True):
            axis.imshow(_tiled(kept[name]), cmap="gray_r", vmin=0, vmax=255)
            axis.set_axis_off()
            axis.set_title(title if title in columns else f"{title}\n{label}", fontsize=8)
    figure.savefig(path, dpi=130)


def _tiled(images: Tensor) -> Any:
    """A row for each class: (classes · PER_CLASS, 1, h, w) -> (classes · (h + 1), ...)."""
    tiles = torch.nn.functional.pad(images[:, 0], (0, 1, 0, 1))
    n, h, w = tiles.shape
    grid = tiles.reshape(n // PER_CLASS, PER_CLASS, h, w).transpose(1, 2)
    return grid.reshape(n // PER_CLASS * h, PER_CLASS * w).numpy()
