"""What a user sees of `python -m rcm.evaluate`, and what it writes."""

import fcntl
import json
import shutil
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rcm import evaluate, train
from rcm.data.digits import DigitsConfig
from rcm.evaluation.evaluator import EVALUATION_SEED, NOISE_SEED, Evaluator
from rcm.validation import MAX_INTEGER
from tests.rcm.commands.tiny_run import one_line_of, start, start_method

pytestmark = pytest.mark.xdist_group("train")

FEW = ["--teacher-steps", "1", "--steps", "1", "2"]
ROW = {
    *("network", "steps", "evaluations", "mid_times", "frechet_distance", "label_agreement"),
    *("same_noise_rmse", "diversity", "diversity_ratio", "precision", "recall"),
}


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of a finished run."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture(scope="module")
def flow_map(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "ayf"
    short = ["--student.iterations", "1", "--probe-every", "100"]
    assert start_method(folder, "ayf", finished, *short) == 0
    return folder


def scored(run: Path, *options: str) -> dict[str, Any]:
    assert evaluate.main([str(run), *options]) == 0
    content: dict[str, Any] = json.loads((run / "evaluation.json").read_text())
    return content


def files(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_it_scores_teacher_and_student(run: Path, capsys: pytest.CaptureFixture) -> None:
    before = files(run)
    with open(run / "lock", "wb") as lock:  # the run is still training
        fcntl.flock(lock, fcntl.LOCK_EX)
        content = scored(run)
    printed = capsys.readouterr()
    table = printed.out.splitlines()
    assert len(table) == 2 + 10
    assert table[2].startswith("| real digits, half against half | – |")
    assert "| teacher, 8 steps | 15 |" in printed.out
    assert printed.err == f"written: {run / 'evaluation.json'}\n"
    after = files(run)
    new = {Path(name).name for name in after.keys() - before.keys()}
    assert new == {"evaluation.json", "evaluation.safetensors"}
    assert {name: after[name] for name in before} == before

    rows = content.pop("rows")
    assert content == {
        "preset": "digits",
        "method": "rcm",
        "seed": 0,
        "teacher_run": None,
        "iterations": 10,
        "batch": 16,
        "torch": torch.__version__,
        "protocol": {
            "noise_seed": EVALUATION_SEED,
            "samples": 200,
            "features": "classifier",
            "reference_steps": 32,
        },
    }
    assert all(row.keys() == ROW for row in rows)
    sources = [(r["network"], r["steps"], r["evaluations"], r["mid_times"]) for r in rows]
    assert sources == [
        ("real", None, None, None),
        *(("teacher", n, 2 * n - 1, None) for n in (1, 2, 4, 8, 16, 32)),
        ("student", 1, 1, []),
        ("student", 2, 2, [0.9]),
        ("student", 4, 4, [0.9, 0.6, 0.3]),
    ]
    nulls = [(r["network"], name) for r in rows for name in sorted(ROW) if r[name] is None]
    real = ("diversity_ratio", "evaluations", "mid_times", "same_noise_rmse", "steps")
    assert nulls == [("real", name) for name in real] + [("teacher", "mid_times")] * 6
    assert rows[6]["same_noise_rmse"] == 0
    assert rows[6]["diversity_ratio"] == 1


def test_scores_of_the_same_noise_are_those_of_the_report(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "EVALUATION_SEED", NOISE_SEED)
    rows = {(r["network"], r["steps"]): r for r in scored(run)["rows"]}
    report = json.loads((run / "report.json").read_text())["scores"]
    for name, scores in report.items():
        network, _, rest = name.partition(", ")
        key = ("real", None) if network.startswith("real") else (network, int(rest.split()[0]))
        assert {metric: rows[key][metric] for metric in scores} == scores, name


def test_samples_are_shown_at_the_same_places(run: Path) -> None:
    scored(run)
    shown = load_file(run / "evaluation.safetensors")
    names = ["data", "labels", "student-1", "student-2", "student-4", "teacher-32"]
    assert sorted(shown) == names
    assert shown.pop("labels").tolist() == [label for label in range(10) for _ in range(8)]
    assert {(x.dtype, tuple(x.shape)) for x in shown.values()} == {(torch.float32, (80, 1, 8, 8))}
    assert not torch.equal(shown["student-1"], shown["student-2"])


def test_no_seed_repeats_the_noise_of_a_report(run: Path) -> None:
    arguments = [evaluate.Arguments(run=run, seed=seed) for seed in (0, 1, 2, MAX_INTEGER)]
    seeds = [seed for a in arguments for seed in (a.noise_seed, a.noise_seed + 1)]
    assert len(set(seeds)) == len(seeds)
    assert min(seeds) > NOISE_SEED + 2  # of the probes
    torch.Generator().manual_seed(max(seeds))
    first, again, other = (scored(run, *FEW, "--seed", s) for s in ("0", "0", "1"))
    assert first == again
    assert other["protocol"]["noise_seed"] != first["protocol"]["noise_seed"]
    assert other["rows"][0] == first["rows"][0]
    assert all(a != b for a, b in zip(other["rows"][1:], first["rows"][1:], strict=True))


def test_each_schedule_is_a_row(run: Path, capsys: pytest.CaptureFixture) -> None:
    schedules = ["--mid-times", "0.5", "0.9", "1.3,1.0,0.6"]
    rows = scored(run, "--teacher-steps", "1", "--steps", "2", *schedules)["rows"]
    found = [(row["steps"], row["mid_times"]) for row in rows if row["network"] == "student"]
    assert found == [(2, [0.9]), (2, [0.5]), (4, [1.3, 1.0, 0.6])]  # 0.9 is the run's own
    assert rows[2]["frechet_distance"] != rows[3]["frechet_distance"]
    assert "| student, 4 steps, mid times 1.3, 1, 0.6 | 4 |" in capsys.readouterr().out
    assert "student-4" not in load_file(run / "evaluation.safetensors")


def test_a_flow_map_is_scored_without_mid_times(
    finished: Path, flow_map: Path, capsys: pytest.CaptureFixture
) -> None:
    content = scored(flow_map, "--teacher-steps", "1", "--steps", "1", "8")
    rows = [(row["steps"], row["mid_times"]) for row in content["rows"][2:]]
    assert rows == [(1, None), (8, None)]
    assert content["method"] == "ayf"
    assert content["teacher_run"] == str(finished)
    capsys.readouterr()
    assert evaluate.main([str(flow_map), "--mid-times", "1.1"]) == 2
    assert one_line_of(capsys) == (
        "error: --mid-times 1.1: the sampler of this method has no mid times\n"
    )


def test_fewer_samples_in_other_features_into_another_file(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.json"
    for _ in range(2):  # an evaluation may be replaced
        options = ["--samples", "41", "--features", "pixels", "--out", str(out), *FEW]
        assert evaluate.main([str(run), *options]) == 0
    protocol = json.loads(out.read_text())["protocol"]
    assert protocol["samples"] == 40
    assert protocol["features"] == "pixels"
    assert not (run / "evaluation.json").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "scores.json"]


def test_evaluations_share_the_reference_of_one_teacher_and_noise(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "references"
    options = ["--teacher-steps", "32", "--steps", "1", "--reference-folder", str(folder)]
    without = scored(run, *options[:4])
    first = scored(run, *options)
    (file,) = folder.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "reference", None)  # is not drawn again
        assert scored(run, *options) == first == without

    scored(run, *options, "--seed", "1")
    scored(run, *options, "--samples", "100")
    weights = load_file(run / "teacher.safetensors")
    save_file({n: 0.5 * w for n, w in weights.items()}, run / "teacher.safetensors")
    scored(run, *options)
    assert len(list(folder.iterdir())) == 4

    save_file(weights, run / "teacher.safetensors")
    save_file({"samples": torch.zeros(3)}, file)
    capsys.readouterr()
    assert evaluate.main([str(run), *options]) == 1
    assert f"{file} does not hold the samples of a teacher; delete it" in one_line_of(capsys)
    (tmp_path / "file").touch()
    assert evaluate.main([str(run), *options[:-1], str(tmp_path / "file" / "below")]) == 1
    assert "Not a directory" in one_line_of(capsys)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--steps", "0"], "--steps is 0; it must be an integer in 1.."),
        (["--steps", "2", "9"], "--steps is 9; it must be in 1..4"),
        (["--steps", "x"], "--steps"),
        (["--teacher-steps", "0"], "--teacher-steps is 0; it must be an integer in 1..1000"),
        (["--teacher-steps", "1001"], "--teacher-steps is 1001"),
        (["--mid-times", "1.0,1.3"], "--mid-times 1.0,1.3: mid_times is (1.0, 1.3); it must be"),
        (["--mid-times", "1.1", "1.6"], "--mid-times 1.6: mid_times is (1.6,); it must be numbers"),
        (["--mid-times", "0"], "from below atan(sigma_max) = 1.558 to above 0"),
        (["--mid-times", "nan"], "--mid-times nan"),
        (["--mid-times", "1.1,"], "--mid-times is '1.1,'; it must be numbers, with commas"),
        (["--seed", "-1"], "--seed is -1; it must be an integer in 0.."),
        (["--seed", "1.5"], "--seed is '1.5'"),
        (["--samples", "201"], "--samples is 201; it must be in 22..200, the number of samples"),
        (["--samples", "21"], "--samples is 21; it must be in 22..200"),
        (["--features", "pixel"], "--features is 'pixel'; it must be classifier, pixels"),
        (["--out", "/nowhere/a.json"], "--out is /nowhere/a.json; its folder /nowhere does not"),
        (["--out", "/"], "--out is /; it must be a file, not a folder"),
        (["--reference-folder", "/dev/null"], "--reference-folder is /dev/null; it must be a fol"),
        (["--sample", "40"], "perhaps you meant --samples"),
    ],
)
def test_an_invalid_option_ends_with_one_line_and_writes_nothing(
    run: Path, options: list[str], words: str, capsys: pytest.CaptureFixture
) -> None:
    before = files(run)
    assert evaluate.main([str(run), *options]) == 2
    assert words in one_line_of(capsys)
    assert files(run) == before


def test_it_replaces_no_other_file(run: Path, capsys: pytest.CaptureFixture) -> None:
    before = files(run)
    for name in ("config.json", "student.safetensors", "report.json"):
        assert evaluate.main([str(run), "--out", str(run / name)]) == 2
        assert "it exists and is no evaluation of a run" in one_line_of(capsys)
    assert files(run) == before


def test_a_folder_that_cannot_be_written_is_rejected(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert evaluate.main([str(run)]) == 2
    assert f"{run} cannot be written" in one_line_of(capsys)


def test_a_folder_that_is_no_run_is_rejected(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        assert evaluate.main([str(path)]) == 2
        assert f"{path} is not a run folder" in one_line_of(capsys)
    (tmp_path / "config.json").write_text('{"preset": "wan-tiny", "method": "rcm"}')
    assert evaluate.main([str(tmp_path)]) == 2
    assert "distils a pretrained network" in one_line_of(capsys)
    (tmp_path / "config.json").write_text("{")
    assert evaluate.main([str(tmp_path)]) == 1
    assert "config.json cannot be read" in one_line_of(capsys)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("student", "wait for the first report"), ("teacher", "wait until the run has trained")],
)
def test_weights_that_are_missing_damaged_or_of_another_model_are_named(
    run: Path, name: str, hint: str, capsys: pytest.CaptureFixture
) -> None:
    path = run / f"{name}.safetensors"
    weights = load_file(path)
    before = files(run)
    for damage, words in (
        (path.unlink, f"does not exist yet; {hint}"),
        (lambda: path.write_bytes(b"damaged"), "is damaged"),
        (lambda: save_file({"other": torch.ones(1)}, path), "do not fit the model"),
        (lambda: save_file({n: w * torch.nan for n, w in weights.items()}, path), "NaN"),
    ):
        damage()
        assert evaluate.main([str(run), *FEW]) == 1
        line = one_line_of(capsys)
        assert words in line
        assert name in line
        assert files(run).keys() <= before.keys()


def test_too_few_samples_to_score_end_with_one_line(
    run: Path, capsys: pytest.CaptureFixture
) -> None:
    path = run / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"evaluation_samples": 6}))
    assert evaluate.main([str(run), *FEW]) == 1
    line = one_line_of(capsys)
    assert line.startswith("error: the 6 real samples cannot be scored: ")
    assert line.endswith("That takes a larger --samples or more images per class\n")


def test_changed_data_are_not_scored(run: Path, capsys: pytest.CaptureFixture) -> None:
    path = run / "data.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps(facts | {"samples": 199, "class_names": list("abcdefghij")}))
    before = files(run)
    assert evaluate.main([str(run), *FEW]) == 1
    assert one_line_of(capsys) == (
        f"error: the data are not those that {run} was trained on: their samples and class_names "
        "changed; restore them\n"
    )
    assert files(run) == before


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PermissionError(13, "Permission denied", "a.gz"), "a file of digits cannot be read: [Err"),
        (EOFError("ended before"), "a file of digits cannot be read: ended before"),
        (zlib.error("Error -3"), "a file of digits cannot be read: Error -3"),
        (ImportError("pip install it"), "pip install it"),
    ],
)
@pytest.mark.parametrize("command", [evaluate, train])
def test_data_that_cannot_be_read_end_with_one_line(
    command: ModuleType,
    error: Exception,
    words: str,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    def load(config: DigitsConfig) -> None:
        raise error

    monkeypatch.setattr(DigitsConfig, "load", load)
    argv = [str(run)] if command is evaluate else ["--folder", str(tmp_path / "new")]
    assert command.main(argv) == 1
    assert words in one_line_of(capsys)
    assert not (tmp_path / "new").exists()


def test_a_file_that_cannot_be_written_does_not_lose_the_table(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evaluate, "write_atomically", full)
    assert evaluate.main([str(run), *FEW]) == 1
    printed = capsys.readouterr()
    assert "| student, 2 steps |" in printed.out
    assert printed.err == (
        f"error: writing {run / 'evaluation.json'} failed (No space left on device)\n"
    )


def test_an_interrupt_ends_with_one_line(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    before = files(run)
    monkeypatch.setattr(Evaluator, "student_samples", interrupted)
    assert evaluate.main([str(run), *FEW]) == 130
    assert capsys.readouterr() == ("", "\ninterrupted; no scores were written\n")
    assert files(run) == before


def test_a_run_in_training_is_scored_at_its_last_report(run: Path) -> None:
    (run / "grids" / "0000010.png").unlink()
    (run / "report.json").unlink()
    assert scored(run, *FEW)["iterations"] == 5


def test_a_run_continues_beside_its_evaluation(run: Path) -> None:
    scored(run, *FEW)
    report = (run / "report.json").read_bytes()
    assert start(run) == 0
    assert (run / "report.json").read_bytes() == report
    assert (run / "evaluation.json").exists()
