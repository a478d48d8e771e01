"""The whole page: a section for each preset, with tables, figures, pictures and settings."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

from rcm.evaluation.page.collect import ABSENT, Run
from rcm.evaluation.page.curves import curve_figures, legend
from rcm.evaluation.page.grids import grids
from rcm.evaluation.page.html import Markup, counted, element, joined
from rcm.evaluation.page.metrics_file import BINS
from rcm.evaluation.page.quality import quality_figures
from rcm.evaluation.page.tables import (
    common_settings,
    score_table,
    scrollable,
    seed_table,
    settings_table,
    teacher_table,
)

HERE = Path(__file__).parent
CODE = re.compile(r"`([^`]*)`")


def page(runs: Sequence[Run]) -> bytes:
    """The page as HTML in UTF-8. The same runs give the same bytes.

    It loads nothing: its policy allows no address but those inside it, and no script or style but
    its own.

    Raises:
        RunError: samples of a run are damaged.
    """
    style, script = (
        Markup(f"\n{(HERE / name).read_text('utf-8')}") for name in ("page.css", "page.js")
    )
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}"
    )
    presets = list(dict.fromkeys(run.preset for run in runs))
    title = f"Comparison of {counted(len(runs), 'run')}"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("link", rel="icon", href="data:,"),
        element("style", style),
    )
    sections = [
        _section(str(place), preset, [run for run in runs if run.preset == preset])
        for place, preset in enumerate(presets)
    ]
    body = element(
        "body",
        element("header", element("h1", title), element("p", _summary(runs))),
        element("main", *sections),
        element("script", script),
    )
    html = element("html", head, body, lang="en")
    # Names of folders and strings of JSON may hold what UTF-8 cannot.
    return f"<!doctype html>\n{html}\n".encode("utf-8", "replace")


def _hash(content: str) -> str:
    digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def _summary(runs: Sequence[Run]) -> str:
    methods = dict.fromkeys(run.method for run in runs if run.method != ABSENT)
    return (
        f"Few-step students, distilled by {', '.join(methods) or 'an unknown method'}. Arrows say "
        "which way a score is better."
    )


def _section(key: str, preset: str, runs: list[Run]) -> Markup:
    parts = [
        element("h2", f"Preset {preset}"),
        _notes(runs),
        legend(runs, key),
        *_scores(runs),
        *_quality(runs, key),
        *_curves(runs),
        *_samples(runs),
        *_settings(runs),
    ]
    return element("section", *parts, class_="preset")


def _notes(runs: list[Run]) -> Markup | None:
    """What a reader should know before comparing the runs."""
    notes: dict[str, list[str]] = {}
    for run in runs:
        for note in run.notes:
            notes.setdefault(note, []).append(run.label)
    protocols: dict[str, list[str]] = {}
    for run in runs:
        if "protocol" in run.facts:
            text = json.dumps(run.facts["protocol"], sort_keys=True)
            protocols.setdefault(text, []).append(run.label)
    if len(protocols) > 1:
        for text, labels in protocols.items():
            note = f"evaluated by the protocol `{text}`, and others by another; compare with care"
            notes[note] = labels
    if not notes:
        return None
    items = [
        element("li", element("strong", ", ".join(names)), ": ", _with_code(note))
        for note, names in notes.items()
    ]
    return element("ul", *items, class_="notes", aria_label="Notes")


def _with_code(text: str) -> Markup:
    """Text whose parts between backticks are code."""
    parts = CODE.split(text)
    return joined(element("code", p) if place % 2 else p for place, p in enumerate(parts))


def _scores(runs: list[Run]) -> list[Markup]:
    if not any(run.students for run in runs):
        return []
    parts = [
        element("h3", "Scores"),
        element(
            "p",
            "One row for each run and number of sampling steps; the best values of the students "
            "are bold. Mid times follow steps that a run has several schedules for. Select a "
            "column's head to sort by it. FD is the Fréchet distance to the real data.",
        ),
        score_table(runs),
    ]
    if (means := seed_table(runs)) is not None:
        text = (
            "Runs that differ only in their seed: the mean over the seeds ± half of the range, "
            "(largest − smallest) / 2."
        )
        parts += [element("h4", "Over seeds"), element("p", text), means]
    if (teachers := teacher_table(runs)) is not None:
        summary = element("summary", "Scores of the teachers with all numbers of steps")
        parts.append(element("details", summary, teachers))
    return parts


def _quality(runs: list[Run], key: str) -> list[Markup]:
    if not (figures := quality_figures(runs, key)):
        return []
    text = (
        "Students with 1, 2 and 4 steps, and the teacher with n steps of Heun's method, which are "
        "2n − 1 evaluations. The dashed line is one half of the real data against the other; "
        "samples can be closer to the data than that, because there are more of them."
    )
    return _plots("Quality against network evaluations", text, figures)


def _curves(runs: list[Run]) -> list[Markup]:
    if not (figures := curve_figures(runs)):
        return []
    text = "Of the student."
    if any(curve.thinned for run in runs for curve in run.metrics.curves.values()):
        text += (
            f" Curves with more than {BINS} points are divided into {BINS} bins of equal numbers "
            "of iterations: the line is the median of a bin, the shaded area reaches from its "
            "smallest to its largest value, as far as the axis goes."
        )
    return _plots("Training", text, figures)


def _plots(title: str, text: str, figures: list[Markup]) -> list[Markup]:
    """A heading, what the figures show, and the figures."""
    return [
        element("h3", title),
        element("p", text),
        element("div", *figures, class_="plots"),
    ]


def _samples(runs: list[Run]) -> list[Markup]:
    if (pictures := grids(runs)) is None:
        return []
    text = (
        "All samples at the same place start from the same noise and have the same class; a row is "
        "a class. All pictures have the range of the data."
    )
    return [element("h3", "Samples"), element("p", text), pictures]


def _settings(runs: list[Run]) -> list[Markup]:
    folders = [
        element("tr", element("th", run.label, scope="row"), element("td", str(run.path)))
        for run in runs
    ]
    differing = settings_table(runs, of_all=True)
    partial = settings_table(runs, of_all=False)
    few = element("summary", "Settings that only some of the runs have")
    return [
        element("h3", "Settings that differ"),
        differing or element("p", "None of those that all runs have."),
        *([] if partial is None else [element("details", few, partial)]),
        element(
            "details", element("summary", "Settings that all runs share"), common_settings(runs)
        ),
        element(
            "details",
            element("summary", "Run folders"),
            scrollable("Run folders", element("table", element("tbody", *folders))),
        ),
    ]
