"""What a user sees of `python -m rcm.report`, and what it reads."""

import base64
import hashlib
import io
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from rcm import report
from rcm.evaluation.page.metrics_file import thinned
from tests.rcm.commands.tiny_run import one_line_of
from tests.rcm.evaluation.html_tree import Element, parse
from tests.rcm.evaluation.written_runs import (
    CLASSES,
    COUNT,
    samples,
    write_evaluation,
    write_run,
    write_unfinished,
)

pytestmark = pytest.mark.xdist_group("train")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "report.html"


def page_of(out: Path, *runs: Path) -> Element:
    assert report.main([*map(str, runs), "--out", str(out)]) == 0
    return parse(out.read_bytes())


def scores(page: Element) -> list[list[str]]:
    """The rows of the students, without the marks of the best values."""
    body, _ = page.one("table", "sortable").all("tbody")
    return [[cell.removesuffix(" best") for cell in row] for row in body.rows()]


def notes(page: Element) -> str:
    return " ".join(x.text() for x in page.all("ul", "notes"))


# Real runs


def test_report_of_a_run_without_an_evaluation(finished: Path, out: Path) -> None:
    page = page_of(out, finished)
    expected = json.loads((finished / "report.json").read_text())["scores"]["student, 2 steps"]
    names = ("label_agreement", "diversity_ratio", "precision", "recall", "same_noise_rmse")
    shown = [f"{expected[name]:.3f}" if name in expected else "–" for name in names]
    fd = f"{expected['frechet_distance']:.2f}"
    assert scores(page)[1] == ["finished", "rcm", "0", "10", "2", "2", fd, *shown]
    assert "python -m rcm.evaluate RUN" in notes(page)
    teachers = page.named("Scores of the teachers").rows()[1:]
    assert [row[1:3] for row in teachers] == [["1", "1"], ["2", "3"], ["8", "15"], ["32", "63"]]
    titles = [x.text() for figure in page.all("figure", "plot") for x in figure.all("strong")]
    assert {"Loss", "Probe RMSE", "Tangent norm", "JVP norm", "Gradient norm"} <= set(titles)


# Scores


def test_scores_are_those_of_the_evaluation(tmp_path: Path, out: Path) -> None:
    page = page_of(out, write_run(tmp_path / "a", fd=3.0), write_run(tmp_path / "b", fd=2.0))
    assert scores(page)[:3] == [
        ["a", "scm", "0", "40", "1", "1", "3.00", "0.960", "1.125", "0.700", "0.125", "0.250"],
        ["a", "scm", "0", "40", "2", "2", "1.50", "0.960", "1.000", "0.700", "0.250", "0.250"],
        ["a", "scm", "0", "40", "4", "4", "0.75", "0.960", "0.750", "0.700", "0.500", "0.250"],
    ]
    _, references = page.one("table", "sortable").all("tbody")
    assert [row[:4] for row in references.rows()] == [
        ["real data", "–", "–", "1.50"],
        ["teacher", "32", "63", "1.00"],
    ]
    assert [row[0] for row in page.named("Scores of the teachers").rows()[1:]] == ["teacher"] * 3
    assert notes(page) == ""


def test_the_best_value_of_each_metric_is_marked(tmp_path: Path, out: Path) -> None:
    page = page_of(out, write_run(tmp_path / "a", fd=3.0), write_run(tmp_path / "b", fd=2.0))
    body, _ = page.one("table", "sortable").all("tbody")
    best = [{i for i, cell in enumerate(row) if cell.endswith(" best")} for row in body.rows()]
    fd, agreement, ratio, precision, recall, rmse = range(6, 12)
    alike = {agreement, precision, rmse}
    one, two, four = alike, alike | {ratio}, alike | {recall}
    assert best == [one, two, four, one, two, four | {fd}]


def test_runs_that_differ_in_their_seed_are_averaged(tmp_path: Path, out: Path) -> None:
    runs = [write_run(tmp_path / f"s{s}", seed=s, fd=fd) for s, fd in enumerate((2.0, 2.5, 4.5))]
    page = page_of(out, *runs, write_run(tmp_path / "other", lr=1e-3))
    rows = page.named("Means over seeds").rows()
    assert rows[1][:4] == ["s0, s1, s2", "0, 1, 2", "1", "3.00 ± 1.25"]
    assert len(rows) == 1 + 3
    styles = [x.one("svg")["class"] for x in page.one("div", "legend").all("button")]
    assert [style.split()[0] for style in styles[:4] if style] == ["c0", "c0", "c0", "c1"]
    assert len(set(styles)) == 5


def test_an_evaluation_of_an_unfinished_run_says_so(tmp_path: Path, out: Path) -> None:
    runs = [write_run(tmp_path / f"s{seed}", seed=seed) for seed in range(2)]
    evaluation = json.loads((runs[1] / "evaluation.json").read_text())
    (runs[1] / "evaluation.json").write_text(json.dumps(evaluation | {"iterations": 20}))
    page = page_of(out, *runs)
    assert [row[3] for row in scores(page)] == ["40"] * 3 + ["20 of 40"] * 3
    assert "Means over seeds" not in {x["aria-label"] for x in page.all("div", "scroll")}


def test_schedules_with_the_same_steps_are_told_apart(tmp_path: Path, out: Path) -> None:
    runs = [write_run(tmp_path / f"s{seed}", seed=seed) for seed in range(2)]
    for run, fd in zip(runs, (1.0, 3.0), strict=True):
        evaluation = json.loads((run / "evaluation.json").read_text())
        [two] = [row for row in evaluation["rows"] if row["steps"] == 2]
        two["mid_times"] = [1.5]
        evaluation["rows"].append({**two, "mid_times": [0.7], "frechet_distance": fd})
        (run / "evaluation.json").write_text(json.dumps(evaluation))
    page = page_of(out, *runs)
    rows = [["1", "2.00"], ["2 (1.5)", "1.00"], ["2 (0.7)", "1.00"], ["4", "0.50"]]
    assert [[row[4], row[6]] for row in scores(page)[:4]] == rows
    means = [row[2:4] for row in page.named("Means over seeds").rows()]
    assert ["2 (1.5)", "1.00 ± 0.00"] in means
    assert ["2 (0.7)", "2.00 ± 1.00"] in means
    figure = next(f for f in page.all("figure", "plot") if f.one("svg")["data-x"] is None)
    titles = [title.text() for title in figure.all("title")]
    assert "s1, mid times 0.7, 2 steps, 2 evaluations: FD 3.00" in titles
    lines = [g.one("path")["d"] or "" for g in figure.all("g") if (g["class"] or "")[:1] == "c"]
    assert [line.count("L") for line in lines] == [2, 2]
    assert lines[0] == lines[1]  # through the first schedule, which both have in common


def test_unfinished_runs_have_the_scores_of_their_last_evaluation(
    tmp_path: Path, out: Path
) -> None:
    run = write_unfinished(tmp_path / "a")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:30]))
    page = page_of(out, run)
    assert [row[3:7] for row in scores(page)] == [
        ["20 of 40", "1", "1", "20.00"],
        ["20 of 40", "2", "2", "20.00"],
    ]
    assert "no report yet: it is at iteration 24 of its student; the scores are" in notes(page)
    [second, _] = [place for place, line in enumerate(lines) if "samples" in line and "40" in line]
    (run / "metrics.jsonl").write_text("".join(lines[: second + 1]))
    assert [row[3:7] for row in scores(page_of(out, run))] == [["40 of 40", "1", "1", "10.00"]]
    (run / "metrics.jsonl").write_text("".join(lines[:10]))
    page = page_of(out, run)
    assert "no scores so far" in notes(page)
    assert not list(page.all("table", "sortable"))
    assert list(page.all("figure", "plot"))


def test_presets_have_sections_of_their_own(tmp_path: Path, out: Path) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", preset="letters")
    first, second = page_of(out, a, b).all("section", "preset")
    assert [first.one("h2").text(), second.one("h2").text()] == [
        "Preset digits",
        "Preset letters",
    ]
    assert {row[0] for row in scores(first)} == {"a"}
    assert {row[0] for row in scores(second)} == {"b"}


def test_different_protocols_are_noted(tmp_path: Path, out: Path) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    evaluation = json.loads((b / "evaluation.json").read_text())
    evaluation["protocol"]["noise_seed"] = 2
    (b / "evaluation.json").write_text(json.dumps(evaluation))
    said = notes(page_of(out, a, b))
    assert 'b: evaluated by the protocol {"features": "classifier", "noise_seed": 2' in said
    assert said.count("compare with care") == 2


def test_settings_are_listed_where_they_differ(tmp_path: Path, out: Path) -> None:
    a, b = write_run(tmp_path / "a", seed=3), write_run(tmp_path / "b", lr=1e-3)
    page = page_of(out, a, b)
    assert page.named("Settings that differ").rows() == [
        ["Setting", "a", "b"],
        ["seed", "3", "0"],
        ["student.optimizer.lr", "0.0001", "0.001"],
    ]
    assert ["torch", "2.13.0"] in page.named("Settings in common").rows()
    assert not [row for row in page.named("Settings in common").rows() if row[0] == "seed"]


# Figures


def test_quality_is_drawn_against_evaluations(tmp_path: Path, out: Path) -> None:
    page = page_of(out, write_run(tmp_path / "a"), write_run(tmp_path / "b", fd=3.0))
    figure, *others = [f for f in page.all("figure", "plot") if f.one("svg")["data-x"] is None]
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


def test_curves_are_those_of_the_student(tmp_path: Path, out: Path) -> None:
    page = page_of(out, write_run(tmp_path / "a"), write_run(tmp_path / "b", seed=1))
    figures = {f.one("strong").text(): f for f in page.all("figure", "plot")}
    probe = figures["Probe RMSE"]
    assert len(list(probe.all("path", "line"))) == len(list(probe.all("line", "limit"))) == 2
    assert probe.one("svg")["aria-label"] == (
        "Probe RMSE over the iterations: a from 0.4 to 0.2, b from 0.4 to 0.2"
    )
    assert "a from 10 to 10" in (figures["FD"].one("svg")["aria-label"] or "").replace("20", "10")
    assert "77" not in (figures["Loss"].one("svg")["aria-label"] or "")  # of the teacher
    assert "Curves with more than" not in page.text()


def test_long_curves_are_thinned_and_it_is_said(tmp_path: Path, out: Path) -> None:
    page = page_of(out, write_run(tmp_path / "a", iterations=5000))
    assert "120 bins of equal numbers of iterations" in page.text()
    [loss] = [f for f in page.all("figure", "plot") if f.one("strong").text() == "Loss"]
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
def test_pictures_show_samples_in_the_range_of_the_data(
    channels: int, tmp_path: Path, out: Path
) -> None:
    page = page_of(out, write_run(tmp_path / "a", channels=channels))
    images = {figure.one("figcaption").text(): figure.one("img") for figure in page.all("figure")
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


def test_data_and_a_common_teacher_are_shown_once(tmp_path: Path, out: Path) -> None:
    runs = [write_run(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    alts = [x["alt"] or "" for x in page_of(out, *runs).all("img")]
    assert len(alts) == 2 + 2 * 3
    other = {**samples(), "teacher-32": samples()["data"] + 0.02}
    save_file(other, runs[1] / "evaluation.safetensors")
    alts = [x["alt"] or "" for x in page_of(out, *runs).all("img")]
    assert [alt.split(":")[0] for alt in alts[:3]] == [
        "Samples of data",
        "Samples of teacher of a, 32 steps",
        "Samples of teacher of b, 32 steps",
    ]


# The file


def test_the_same_runs_give_the_same_bytes(tmp_path: Path, out: Path) -> None:
    runs = [write_run(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    page_of(out, *runs)
    first = out.read_bytes()
    page_of(out, *runs)
    assert out.read_bytes() == first


def test_the_page_needs_nothing_else(tmp_path: Path, out: Path) -> None:
    page = page_of(out, write_run(tmp_path / "a"))
    for element in (x for tag in ("img", "link", "script", "a", "use") for x in page.all(tag)):
        for attribute in ("src", "href"):
            assert (element[attribute] or "data:").startswith("data:")
    content = out.read_text()
    assert set(re.findall(r"https?://[^\"'\s]+", content)) == {"http://www.w3.org/2000/svg"}
    assert "url(" not in content.replace("url(#", "")
    [policy] = [x["content"] for x in page.all("meta") if x["http-equiv"]]
    for name in ("script", "style"):
        digest = hashlib.sha256(page.one(name).text().encode()).digest()
        assert f"{name}-src 'sha256-{base64.b64encode(digest).decode()}'" in (policy or "")
    assert "default-src 'none'" in (policy or "")


def test_twelve_long_runs_fit_in_three_megabytes(tmp_path: Path, out: Path) -> None:
    runs = [
        write_run(tmp_path / f"run{i}", seed=i % 3, lr=1e-4 * (1 + i // 3), iterations=1200)
        for i in range(12)
    ]
    page_of(out, *runs)
    assert out.stat().st_size < 3e6


def test_of_large_pictures_fewer_samples_are_shown(tmp_path: Path, out: Path) -> None:
    runs = [write_run(tmp_path / f"run{i}", seed=i) for i in range(12)]
    random = torch.Generator().manual_seed(0)
    for run in runs:
        content = {
            name: x if name == "labels" else torch.randn(len(x), 3, 32, 32, generator=random)
            for name, x in samples().items()
        }
        save_file(content, run / "evaluation.safetensors")
    page = page_of(out, *runs)
    assert 1.5e6 < out.stat().st_size < 3e6
    assert "10 rows of classes, 1 sample each" in (next(page.all("img"))["alt"] or "")


def test_text_of_files_stays_text(tmp_path: Path, out: Path) -> None:
    name = '<img src=x onerror=alert(1)> & \' `x`" onload="alert(1)'
    run = write_run(tmp_path / name, method="</script><script>alert(1)</script>")
    other = write_run(tmp_path / "other", preset="<b>\ud800")
    (other / "evaluation.safetensors").unlink()  # a library that rejects the next name
    other = other.rename(tmp_path / "\udcff")
    page = page_of(out, run, other)
    assert len(list(page.all("script"))) == 1
    assert not list(page.all("b"))
    assert all((image["src"] or "").startswith("data:image/png") for image in page.all("img"))
    alt = f"Samples of {name}, student, 1 step: 10 rows of classes, 8 samples each"
    assert list(page.all("img"))[2]["alt"] == alt
    assert not [x for tag in ("img", "svg") for x in page.all(tag) if "onload" in x.attributes]
    assert scores(next(page.all("section")))[0][:2] == [name, "</script><script>alert(1)</script>"]


# Damage


def cut_off(lines: list[bytes]) -> list[bytes]:
    return [*lines[:-1], lines[-1][:20]]


def damage_in_the_middle(lines: list[bytes]) -> list[bytes]:
    return [*lines[:5], b"\x00\xff\n", b'{"phase": 1}\n', b"[]\n", *lines[5:]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (cut_off, "the last line of metrics.jsonl is cut off"),
        (damage_in_the_middle, "metrics.jsonl has 3 damaged lines, the first is 6"),
        (lambda lines: [*lines[:5], b"[" * 100_000 + b"\n", *lines[5:]], "1 damaged line 6"),
    ],
)
def test_damaged_metrics_are_left_out_and_it_is_said(
    change: Callable[[list[bytes]], list[bytes]], words: str, tmp_path: Path, out: Path
) -> None:
    run = write_run(tmp_path / "a")
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(b"".join(change(lines)))
    page = page_of(out, run)
    assert words in notes(page)
    assert len([f for f in page.all("figure", "plot") if f.one("svg")["data-x"]]) == 7


def test_values_that_are_not_finite_interrupt_a_curve(tmp_path: Path, out: Path) -> None:
    run = write_run(tmp_path / "a")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    for place, value in ((8, "NaN"), (20, "-Infinity")):
        lines[place] = re.sub(r'"loss": [\d.]+', f'"loss": {value}', lines[place])
    (run / "metrics.jsonl").write_text("\n".join(lines))
    page = page_of(out, run)
    [loss] = [f for f in page.all("figure", "plot") if f.one("strong").text() == "Loss"]
    drawn = loss.one("path", "line")["d"] or ""
    assert drawn.count("M") == 3
    assert not re.search(r'="[^"]*(nan|inf)\b', out.read_text())


def test_a_run_without_metrics_has_no_curves(tmp_path: Path, out: Path) -> None:
    run = write_run(tmp_path / "a")
    (run / "metrics.jsonl").unlink()
    page = page_of(out, run)
    assert "metrics.jsonl is missing" in notes(page)
    assert len(scores(page)) == 3


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("evaluation.json", "{", "evaluation.json cannot be read"),
        ("evaluation.json", "[]", "holds no object"),
        ("evaluation.json", "{}", "has no list of rows"),
        ("evaluation.json", '{"rows": [{"network": "x"}]}', "a row's network is 'x'"),
        (
            "evaluation.json",
            '{"rows": [{"network": "real", "recall": "1"}]}',
            "recall is '1'",
        ),
        ("evaluation.json", '{"rows": [{"network": "student", "steps": 1.5}]}', "steps is 1.5"),
        (
            "evaluation.json",
            '{"rows": [{"network": "student", "mid_times": [null]}]}',
            "mid_times is [None]",
        ),
        ("evaluation.safetensors", "x", "evaluation.safetensors is damaged"),
        ("config.json", "{", "config.json cannot be read"),
    ],
)
def test_damaged_files_are_an_error(
    file: str, content: str, words: str, tmp_path: Path, out: Path, capsys: pytest.CaptureFixture
) -> None:
    run = write_run(tmp_path / "a")
    (run / file).write_text(content)
    assert report.main([str(run), "--out", str(out)]) == 1
    assert words in one_line_of(capsys)
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("data", "it has no data"),
        ("labels", "it has no data (n, channels, height, width) and labels"),
        ("student-2", "student-2 has the shape (2, 1, 8, 8)"),
    ],
)
def test_samples_of_other_shapes_are_an_error(
    name: str, words: str, tmp_path: Path, out: Path, capsys: pytest.CaptureFixture
) -> None:
    run = write_run(tmp_path / "a")
    content = samples()
    if name == "student-2":
        content[name] = content[name][:2].clone()
    else:
        del content[name]
    save_file(content, run / "evaluation.safetensors")
    assert report.main([str(run), "--out", str(out)]) == 1
    assert words in one_line_of(capsys)


def test_a_folder_in_place_of_a_file_is_an_error(
    tmp_path: Path, out: Path, capsys: pytest.CaptureFixture
) -> None:
    for file in ("metrics.jsonl", "evaluation.json", "evaluation.safetensors"):
        run = write_run(tmp_path / file)
        (run / file).unlink()
        (run / file).mkdir()
        assert report.main([str(run), "--out", str(out)]) == 1
        assert "read" in one_line_of(capsys)


def test_a_damaged_report_is_an_error(
    tmp_path: Path, out: Path, capsys: pytest.CaptureFixture
) -> None:
    run = write_unfinished(tmp_path / "a")
    (run / "report.json").write_text('{"scores": {"student, 1 step": 1}}')
    assert report.main([str(run), "--out", str(out)]) == 1
    assert "report.json is damaged" in one_line_of(capsys)


def test_a_run_with_nothing_to_show_is_an_error(
    tmp_path: Path, out: Path, capsys: pytest.CaptureFixture
) -> None:
    run = write_unfinished(tmp_path / "a")
    (run / "metrics.jsonl").write_text('{"phase": "teacher", "iteration": 1, "loss": 1.0}\n')
    assert report.main([str(run), "--out", str(out)]) == 1
    assert f"{run} has no report yet" in one_line_of(capsys)


# Options


def test_invalid_options_are_rejected(
    tmp_path: Path, out: Path, capsys: pytest.CaptureFixture
) -> None:
    run = write_run(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    for arguments, words in (
        ([], "no run folder is given"),
        ([tmp_path / "none"], f"{tmp_path / 'none'} is not a run folder"),
        ([tmp_path / "empty"], "is not a run folder: it has no config.json"),
        ([run, f"{run}/../a"], "is given twice"),
        ([run, "--out", tmp_path], "it must be a file, not a folder"),
        ([run, "--out", tmp_path / "none" / "a.html"], "does not exist"),
        ([run, "--outt", out], "perhaps you meant --out"),
    ):
        assert report.main(list(map(str, arguments))) == 2
        assert words in one_line_of(capsys)


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path, out: Path) -> None:
    for parent in "xy":
        (tmp_path / parent).mkdir()
    runs = [write_run(tmp_path / parent / "a") for parent in "xy"]
    assert {row[0] for row in scores(page_of(out, *runs))} == set(map(str, runs))


def test_a_page_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run = write_run(tmp_path / "a")
    out.write_text("old")

    def full(*paths: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert report.main([str(run), "--out", str(out)]) == 1
    assert "No space left on device" in one_line_of(capsys)
    assert out.read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "report.html"]


def test_a_new_evaluation_replaces_the_report(finished: Path, tmp_path: Path, out: Path) -> None:
    run = write_unfinished(tmp_path / "a")
    (run / "report.json").write_bytes((finished / "report.json").read_bytes())
    assert "rcm.evaluate" in notes(page_of(out, run))
    write_evaluation(run, fd=7.0)
    page = page_of(out, run)
    assert notes(page) == ""
    assert scores(page)[0][6] == "7.00"
