"""Pictures of samples: PNG inside the page, one pixel of the samples to a pixel of the picture."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rcm.errors import RunError
from rcm.evaluation.page.collect import Run
from rcm.evaluation.page.html import Markup, counted, element
from rcm.evaluation.page.references import teacher_name

DATA, LABELS, TEACHER_SAMPLES = "data", "labels", "teacher-32"
STUDENT_SAMPLES = re.compile(r"student-(\d+)")
WIDTH = 160  # pixels of the page; pictures are scaled by the integer that comes closest
MAX_BYTES = 1_500_000  # of all pictures before compression; beyond, fewer samples are shown
MARGIN = 1
PAPER = 255


@dataclass(frozen=True)
class Panel:
    """Samples (classes · count, channels, height, width), class by class."""

    title: str
    samples: Tensor
    run: Run | None


def grids(runs: Sequence[Run]) -> Markup | None:
    """The pictures of all runs that have samples.

    Raises:
        RunError: the samples have other shapes than those of an evaluation.
    """
    having = [run for run in runs if run.samples]
    if not having:
        return None
    for run in having:
        _require_valid(run)
    shapes = {tuple(run.samples[DATA].shape) for run in having}
    if len(shapes) > 1:
        raise RunError(f"evaluations have samples of different shapes: {sorted(shapes)}")
    data = having[0].samples[DATA]
    classes = len(having[0].samples[LABELS].unique())
    groups = [("", [Panel("data", data, None), *_teachers(having)])]
    groups += [(run.label, _students(run)) for run in having]
    count = _count(data, classes, sum(len(panels) for _, panels in groups))
    black, white = next((run.shades for run in having if run.shades), _shades_of(data))
    pictures = [
        element(
            "div",
            element("h4", title) if title else element("h4", "References"),
            element(
                "div", *(_picture(p, classes, count, black, white) for p in panels), class_="row"
            ),
            class_="panels",
            data_run=panels[0].run.number if panels and panels[0].run else None,
        )
        for title, panels in groups
    ]
    return element("div", *pictures, class_="grids")


def _shades_of(data: Tensor) -> tuple[float, float]:
    """Black and white without data.json: one channel is ink on paper, its high values are black."""
    low, high = (bound.item() for bound in data.aminmax())
    return (low, high) if data.shape[1] == 3 else (high, low)


def _require_valid(run: Run) -> None:
    path = run.path / "evaluation.safetensors"
    labels, data = run.samples.get(LABELS), run.samples.get(DATA)
    if labels is None or data is None or data.ndim != 4 or not data.numel():
        raise RunError(f"{path} is damaged: it has no data (n, channels, height, width) and labels")
    if labels.shape != data.shape[:1] or len(labels) % len(labels.unique()):
        raise RunError(f"{path} is damaged: the labels do not fit the data")
    for name, samples in run.samples.items():
        if name != LABELS and samples.shape != data.shape:
            raise RunError(f"{path} is damaged: {name} has the shape {tuple(samples.shape)}")


def _teachers(runs: Sequence[Run]) -> list[Panel]:
    """The samples of each teacher once."""
    found: list[tuple[Tensor, list[str]]] = []
    for run in runs:
        if (samples := run.samples.get(TEACHER_SAMPLES)) is not None:
            same = [names for other, names in found if torch.equal(other, samples)]
            if same:
                same[0].append(run.label)
            else:
                found.append((samples, [run.label]))
    alone = len(found) == 1
    return [Panel(f"{teacher_name(n, alone=alone)}, 32 steps", s, None) for s, n in found]


def _students(run: Run) -> list[Panel]:
    steps = sorted(int(m[1]) for name in run.samples if (m := STUDENT_SAMPLES.fullmatch(name)))
    return [Panel(counted(n, "step"), run.samples[f"student-{n}"], run) for n in steps]


def _count(data: Tensor, classes: int, panels: int) -> int:
    """The samples of a class that are shown: all, or fewer where pictures are large."""
    per_sample = min(data.shape[1], 3) * data.shape[2] * data.shape[3]
    return max(1, min(len(data) // classes, MAX_BYTES // (per_sample * classes * panels)))


def _picture(panel: Panel, classes: int, count: int, black: float, white: float) -> Markup:
    pixels = tiled(panel.samples, classes, count, black, white)
    height, width = pixels.shape[:2]
    scale = max(1, round(WIDTH / width))
    name = f"{panel.run.label}, student, {panel.title}" if panel.run else panel.title
    image = element(
        "img",
        src=_data_uri(pixels),
        width=scale * width,
        height=scale * height,
        alt=f"Samples of {name}: {classes} rows of classes, {counted(count, 'sample')} each",
    )
    frame = element("div", image, class_="tiles", data_rows=classes, data_columns=count)
    return element("figure", frame, element("figcaption", panel.title))


def tiled(samples: Tensor, classes: int, count: int, black: float, white: float) -> np.ndarray:
    """Pixels (height, width) or (height, width, 3) uint8: a row for each class, white margins.

    black and white are the values that are drawn so. Of other numbers of channels than 1 and 3 the
    first is drawn.
    """
    channels = samples.shape[1] if samples.shape[1] in (1, 3) else 1
    shown = samples[:, :channels].unflatten(0, (classes, -1))[:, :count].double()
    unit = ((shown - black) / ((white - black) or 1)).nan_to_num(0.0).clamp(0, 1)
    bytes_ = (255 * unit).round().to(torch.uint8)
    padded = torch.nn.functional.pad(bytes_, (0, MARGIN, 0, MARGIN), value=PAPER)
    rows, columns, _, h, w = padded.shape
    picture = padded.permute(0, 3, 1, 4, 2).reshape(rows * h, columns * w, channels)
    picture = torch.nn.functional.pad(picture, (0, 0, MARGIN, 0, MARGIN, 0), value=PAPER)
    return picture.numpy() if channels == 3 else picture[..., 0].numpy()


def _data_uri(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="png", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
