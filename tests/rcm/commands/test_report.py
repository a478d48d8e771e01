"""What a user sees of `python -m rcm.report`, and what it reads."""

import base64
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rcm import report
from tests.rcm.commands.tiny_run import one_line_of
from tests.rcm.evaluation.html_tree import Element, notes, parse, scores
from tests.rcm.evaluation.written_runs import (
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
