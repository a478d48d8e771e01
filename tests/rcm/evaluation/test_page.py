"""The page of `python -m rcm.report`: scores, figures, pictures and settings of runs."""

import base64
import io
import json
import math
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from rcm.data.dataset import DataFacts
from rcm.evaluation.page.collect import read_runs
from rcm.evaluation.page.metrics_file import thinned
from rcm.evaluation.page.page import page
from tests.rcm.evaluation.html_tree import Element, notes, parse, scores
from tests.rcm.evaluation.written_runs import (
    CLASSES,
    COUNT,
    samples,
    write_run,
    write_unfinished,
)


def page_of(*runs: Path) -> Element:
    return parse(page(read_runs(runs)))


# Scores


def test_scores_are_those_of_the_evaluation(tmp_path: Path) -> None:
    shown = page_of(write_run(tmp_path / "a", fd=3.0), write_run(tmp_path / "b", fd=2.0))
    assert scores(shown)[:3] == [
        ["a", "scm", "0", "40", "1", "1", "3.00", "0.960", "1.125", "0.700", "0.125", "0.250"],
        ["a", "scm", "0", "40", "2", "2", "1.50", "0.960", "1.000", "0.700", "0.250", "0.250"],
        ["a", "scm", "0", "40", "4", "4", "0.75", "0.960", "0.750", "0.700", "0.500", "0.250"],
    ]
    _, references = shown.one("table", "sortable").all("tbody")
    assert [row[:4] for row in references.rows()] == [
        ["real data", "–", "–", "1.50"],
        ["teacher", "32", "63", "1.00"],
    ]
    assert [row[0] for row in shown.named("Scores of the teachers").rows()[1:]] == ["teacher"] * 3
    assert notes(shown) == ""


def test_the_best_value_of_each_metric_is_marked(tmp_path: Path) -> None:
    shown = page_of(write_run(tmp_path / "a", fd=3.0), write_run(tmp_path / "b", fd=2.0))
    body, _ = shown.one("table", "sortable").all("tbody")
    best = [{i for i, cell in enumerate(row) if cell.endswith(" best")} for row in body.rows()]
    fd, agreement, ratio, precision, recall, rmse = range(6, 12)
    alike = {agreement, precision, rmse}
    one, two, four = alike, alike | {ratio}, alike | {recall}
    assert best == [one, two, four, one, two, four | {fd}]


def test_runs_that_differ_in_their_seed_are_averaged(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"s{s}", seed=s, fd=fd) for s, fd in enumerate((2.0, 2.5, 4.5))]
    shown = page_of(*runs, write_run(tmp_path / "other", lr=1e-3))
    rows = shown.named("Means over seeds").rows()
    assert rows[1][:4] == ["s0, s1, s2", "0, 1, 2", "1", "3.00 ± 1.25"]
    assert len(rows) == 1 + 3
    styles = [x.one("svg")["class"] for x in shown.one("div", "legend").all("button")]
    assert [style.split()[0] for style in styles[:4] if style] == ["c0", "c0", "c0", "c1"]
    assert len(set(styles)) == 5


def test_an_evaluation_of_an_unfinished_run_says_so(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"s{seed}", seed=seed) for seed in range(2)]
    evaluation = json.loads((runs[1] / "evaluation.json").read_text())
    (runs[1] / "evaluation.json").write_text(json.dumps(evaluation | {"iterations": 20}))
    shown = page_of(*runs)
    assert [row[3] for row in scores(shown)] == ["40"] * 3 + ["20 of 40"] * 3
    assert "Means over seeds" not in {x["aria-label"] for x in shown.all("div", "scroll")}


def test_schedules_with_the_same_steps_are_told_apart(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"s{seed}", seed=seed) for seed in range(2)]
    for run, fd in zip(runs, (1.0, 3.0), strict=True):
        evaluation = json.loads((run / "evaluation.json").read_text())
        [two] = [row for row in evaluation["rows"] if row["steps"] == 2]
        two["mid_times"] = [1.5]
        evaluation["rows"].append({**two, "mid_times": [0.7], "frechet_distance": fd})
        (run / "evaluation.json").write_text(json.dumps(evaluation))
    shown = page_of(*runs)
    rows = [["1", "2.00"], ["2 (1.5)", "1.00"], ["2 (0.7)", "1.00"], ["4", "0.50"]]
    assert [[row[4], row[6]] for row in scores(shown)[:4]] == rows
    means = [row[2:4] for row in shown.named("Means over seeds").rows()]
    assert ["2 (1.5)", "1.00 ± 0.00"] in means
    assert ["2 (0.7)", "2.00 ± 1.00"] in means
    figure = next(f for f in shown.all("figure", "plot") if f.one("svg")["data-x"] is None)
    titles = [title.text() for title in figure.all("title")]
    assert "s1, mid times 0.7, 2 steps, 2 evaluations: FD 3.00" in titles
    lines = [g.one("path")["d"] or "" for g in figure.all("g") if (g["class"] or "")[:1] == "c"]
    assert [line.count("L") for line in lines] == [2, 2]
    assert lines[0] == lines[1]  # through the first schedule, which both have in common


def test_unfinished_runs_have_the_scores_of_their_last_evaluation(tmp_path: Path) -> None:
    run = write_unfinished(tmp_path / "a")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:30]))
    shown = page_of(run)
    assert [row[3:7] for row in scores(shown)] == [
        ["20 of 40", "1", "1", "20.00"],
        ["20 of 40", "2", "2", "20.00"],
    ]
    assert "no report yet: it is at iteration 24 of its student; the scores are" in notes(shown)
    [second, _] = [place for place, line in enumerate(lines) if "samples" in line and "40" in line]
    (run / "metrics.jsonl").write_text("".join(lines[: second + 1]))
    assert [row[3:7] for row in scores(page_of(run))] == [["40 of 40", "1", "1", "10.00"]]
    (run / "metrics.jsonl").write_text("".join(lines[:10]))
    shown = page_of(run)
    assert "no scores so far" in notes(shown)
    assert not list(shown.all("table", "sortable"))
    assert list(shown.all("figure", "plot"))


def test_presets_have_sections_of_their_own(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", preset="letters")
    first, second = page_of(a, b).all("section", "preset")
    assert [first.one("h2").text(), second.one("h2").text()] == [
        "Preset digits",
        "Preset letters",
    ]
    assert {row[0] for row in scores(first)} == {"a"}
    assert {row[0] for row in scores(second)} == {"b"}


def test_different_protocols_are_noted(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    evaluation = json.loads((b / "evaluation.json").read_text())
    evaluation["protocol"]["noise_seed"] = 2
    (b / "evaluation.json").write_text(json.dumps(evaluation))
    said = notes(page_of(a, b))
    assert 'b: evaluated by the protocol {"features": "classifier", "noise_seed": 2' in said
    assert said.count("compare with care") == 2


def test_settings_are_listed_where_they_differ(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a", seed=3), write_run(tmp_path / "b", lr=1e-3)
    shown = page_of(a, b)
    assert shown.named("Settings that differ").rows() == [
        ["Setting", "a", "b"],
        ["seed", "3", "0"],
        ["student.optimizer.lr", "0.0001", "0.001"],
    ]
    assert ["torch", "2.13.0"] in shown.named("Settings in common").rows()
    assert not [row for row in shown.named("Settings in common").rows() if row[0] == "seed"]


# Figures


def test_quality_is_drawn_against_evaluations(tmp_path: Path) -> None:
    shown = page_of(write_run(tmp_path / "a"), write_run(tmp_path / "b", fd=3.0))
    figure, *others = [f for f in shown.all("figure", "plot") if f.one("svg")["data-x"] is None]
    assert figure.one("strong").text() == "FD\N{NO-BREAK SPACE}↓"
    titles = [title.text() for title in figure.all("title")]
    assert "teacher, 8 steps, 15 evaluations: FD 4.00" in titles
    assert "a, 4 steps, 4 evaluations: FD 0.50" in titles
    assert "a, 1 step, 1 evaluation: FD 2.00" in titles
    assert len(titles) == 3 + 2 * 3
    assert len(list(figure.all("line", "baseline"))) == 1
    assert len(others) == 5
    # On logarithmic axes, FD = fd / steps is a line of slope -1 and the students' are parallel.
    lines = [g.one("path")["d"] for g in figure.all("g") if (g["class"] or "").startswith("c")]
    ups = [[float(y) for y in re.findall(r",([\d.]+)", d or "")] for d in lines]
    assert ups[0][1] - ups[0][0] == pytest.approx(ups[0][2] - ups[0][1], abs=0.2)
    assert ups[1][1] - ups[1][0] == pytest.approx(ups[0][1] - ups[0][0], abs=0.2)


def test_curves_are_those_of_the_student(tmp_path: Path) -> None:
    shown = page_of(write_run(tmp_path / "a"), write_run(tmp_path / "b", seed=1))
    figures = {f.one("strong").text(): f for f in shown.all("figure", "plot")}
    probe = figures["Probe RMSE"]
    assert len(list(probe.all("path", "line"))) == len(list(probe.all("line", "limit"))) == 2
    assert probe.one("svg")["aria-label"] == (
        "Probe RMSE over the iterations: a from 0.4 to 0.2, b from 0.4 to 0.2"
    )
    assert "a from 10 to 10" in (figures["FD"].one("svg")["aria-label"] or "").replace("20", "10")
    assert "77" not in (figures["Loss"].one("svg")["aria-label"] or "")  # of the teacher
    assert "Curves with more than" not in shown.text()


def test_long_curves_are_thinned_and_it_is_said(tmp_path: Path) -> None:
    shown = page_of(write_run(tmp_path / "a", iterations=5000))
    assert "120 bins of equal numbers of iterations" in shown.text()
    [loss] = [f for f in shown.all("figure", "plot") if f.one("strong").text() == "Loss"]
    assert (loss.one("path", "line")["d"] or "").count("L") == 119
    assert loss.one("path", "band")["d"]


def test_bins_have_a_median_and_a_range() -> None:
    values = [1.0, 5.0, 2.0, math.inf, 7.0, 9.0, math.nan, -math.inf, math.inf, 3.0, 4.0, 5.0]
    curve = thinned(list(enumerate(values, start=1)), bins=4)
    assert curve.iterations == (2, 5, 8, 11)
    assert curve.middle == pytest.approx((2, 8, math.nan, 4), nan_ok=True)
    assert curve.low == pytest.approx((1, 7, math.nan, 3), nan_ok=True)
    assert curve.high == pytest.approx((5, 9, math.nan, 5), nan_ok=True)


# Samples


def pixels(image: Element) -> np.ndarray:
    head, _, data = (image["src"] or "").partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_show_samples_in_the_range_of_the_data(channels: int, tmp_path: Path) -> None:
    shown = page_of(write_run(tmp_path / "a", channels=channels))
    images = {figure.one("figcaption").text(): figure.one("img") for figure in shown.all("figure")
              if list(figure.all("img"))}  # fmt: skip
    assert list(images) == ["data", "teacher, 32 steps", "1 step", "2 steps", "4 steps"]
    for caption, name in {"data": "data", "2 steps": "student-2"}.items():
        picture = pixels(images[caption])
        assert picture.shape[:2] == (9 * CLASSES + 1, 9 * COUNT + 1)
        assert picture.ndim == (2 if channels == 1 else 3)
        tiles = picture[1:, 1:].reshape(CLASSES, 9, COUNT, 9, -1)
        assert (tiles[:, 8] == 255).all() and (tiles[:, :, :, 8] == 255).all()
        light = (samples()[name][:, 0, 0, 0].clamp(-1, 1) + 1) / 2
        expected = (255 * (1 - light if channels == 1 else light)).view(CLASSES, COUNT)
        assert tiles[:, 3, :, 3, 0] == pytest.approx(expected.numpy(), abs=1)
    assert images["data"]["width"] == "146"  # twice the pixels
    assert "a, student, 1 step" in (images["1 step"]["alt"] or "")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("black", "white"), [(-1.5, 1.5), (1.5, -1.5)])
def test_pictures_have_the_black_and_white_of_the_data(
    channels: int, black: float, white: float, tmp_path: Path
) -> None:
    """As a run's own grid: gray photographs are no negatives."""
    runs = [write_run(tmp_path / name, channels=channels) for name in "ab"]
    facts = DataFacts(sample_shape=(1, 8, 8), classes=10, samples=80, black=black, white=white)
    (runs[1] / "data.json").write_text(json.dumps(asdict(facts)))
    picture = pixels(next(page_of(*runs).all("img")))
    tiles = picture[1:, 1:].reshape(CLASSES, 9, COUNT, 9, -1)
    expected = 255 * (samples()["data"][:, 0, 0, 0] - black) / (white - black)
    found = tiles[:, 3, :, 3, 0].flatten()
    assert found == pytest.approx(expected.numpy(), abs=1)


def test_data_and_a_common_teacher_are_shown_once(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    alts = [x["alt"] or "" for x in page_of(*runs).all("img")]
    assert len(alts) == 2 + 2 * 3
    other = {**samples(), "teacher-32": samples()["data"] + 0.02}
    save_file(other, runs[1] / "evaluation.safetensors")
    alts = [x["alt"] or "" for x in page_of(*runs).all("img")]
    assert [alt.split(":")[0] for alt in alts[:3]] == [
        "Samples of data",
        "Samples of teacher of a, 32 steps",
        "Samples of teacher of b, 32 steps",
    ]
