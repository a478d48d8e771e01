"""Every option of `python -m rcm.train` with a value that is not allowed.

The command prints one line that names the option, exits with status 2 and creates nothing.
"""

import subprocess
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import pytest

from rcm import run, train
from rcm.presets import PRESETS
from tests.rcm.commands.tiny_run import one_line_of

pytestmark = pytest.mark.xdist_group("train")

HUGE = str(10**30)
NOT_POSITIVE_INTEGERS = ("0", "-1", HUGE, "1.5", "one", "nan", "")
NOT_COUNTS = ("-1", HUGE, "1.5", "one", "inf")  # 0 is allowed
NOT_POSITIVE = ("0", "-1", "nan", "inf", "1e400", "x")
NOT_POSITIVE_OR_INFINITE = ("0", "-1", "nan", "-inf", "x")
NOT_FRACTIONS = ("1", "-0.1", "nan", "inf", "x")
NOT_NEGATIVE_OR_FINITE = ("-1", "nan", "inf", "x")

OPTIMIZER = {
    "lr": (*NOT_POSITIVE, "101"),
    "schedule": ("linear", ""),
    "nonfinite": ("ignore", ""),
    "max-skips": NOT_COUNTS,
    "warmup": NOT_COUNTS,
    "betas": ("0.9 1", "-0.1 0.9", "nan 0.9", "0.9", "a b"),
    "weight-decay": NOT_NEGATIVE_OR_FINITE,
    "clip": NOT_POSITIVE_OR_INFINITE,
}
TIMES = {
    "mean": ("nan", "inf", "-51", "51", "x"),
    "std": (*NOT_POSITIVE, "51"),
    "sigma-data": NOT_POSITIVE,
}
VALUES = {
    "seed": ("-1", str(2**63), "1.5", "one", "nan", ""),
    "device": ("gpu", "meta", "mps", "cuda:-1", "cuda:9999", "cpu:1", ""),
    "threads": (*NOT_POSITIVE_INTEGERS, "1025"),
    **{f"mesh.{name}": NOT_POSITIVE_INTEGERS for name in ("replicate", "ring", "ulysses")},
    "mesh.shard": ("0", "-1", HUGE, "1.5", "one"),
    "accumulation": (*NOT_POSITIVE_INTEGERS, "3"),
    "report-every": NOT_POSITIVE_INTEGERS,
    "checkpoint-every": NOT_POSITIVE_INTEGERS,
    "keep-checkpoints": NOT_POSITIVE_INTEGERS,
    "probe-every": NOT_POSITIVE_INTEGERS,
    "model.dim": (*NOT_POSITIVE_INTEGERS, "62", "65540"),
    "model.depth": (*NOT_POSITIVE_INTEGERS, "1001"),
    "model.heads": (*NOT_POSITIVE_INTEGERS, "3", "128"),
    "model.patch": (*NOT_POSITIVE_INTEGERS, "3", "16"),
    "model.time-embedding": ("x", "Fourier"),
    "model.precision": ("x", "float16", "Float32", ""),
    "model.label-std": ("-1", "101", "nan", "x"),
    "evaluation-samples": (*NOT_POSITIVE_INTEGERS, "3"),
    "teacher.iterations": NOT_POSITIVE_INTEGERS,
    "teacher.batch": (*NOT_POSITIVE_INTEGERS, "1798"),
    **{f"teacher.optimizer.{name}": values for name, values in OPTIMIZER.items()},
    **{f"teacher.times.{name}": values for name, values in TIMES.items()},
    "teacher.label-dropout": NOT_FRACTIONS,
    "teacher.ema.decay": ("x",),
    "teacher.ema.std": (*NOT_POSITIVE, "0.29", "1e-200"),
    "student.iterations": NOT_POSITIVE_INTEGERS,
    "student.batch": (*NOT_POSITIVE_INTEGERS, "1798"),
    "student.sigma-max": (*NOT_POSITIVE_OR_INFINITE, "1e-4"),
    "student.start": (),  # a folder, which the command looks for
    "student.student-every": NOT_POSITIVE_INTEGERS,
    **{f"student.optimizer.{name}": values for name, values in OPTIMIZER.items()},
    **{f"student.critic-optimizer.{name}": values for name, values in OPTIMIZER.items()},
    **{f"student.times.{name}": values for name, values in TIMES.items()},
    **{f"student.score-times.{name}": values for name, values in TIMES.items()},
    "student.tangent-warmup": NOT_COUNTS,
    "student.difference-step": NOT_POSITIVE,
    "student.critic-start": NOT_COUNTS,
    "student.critic-norm": ("x", "L2"),
    "student.form": ("x", ""),
    "student.passes": ("1", "three", ""),
    "student.tangent-norm": ("x", "L2"),
    "student.tangent-norm-eps": NOT_POSITIVE,
    "student.score-weight": NOT_POSITIVE,
    "student.rollout-steps": (*NOT_POSITIVE_INTEGERS, "1001"),
    "student.consistency-weight": NOT_POSITIVE,
    "student.rollout-length": ("x", ""),
    "student.ema.decay": NOT_FRACTIONS,
    "student.ema.std": ("0.05",),  # beside a decay
    "student.guidance.scale": ("-1", "1001", "nan", "x"),
    "student.guidance.max-scale": ("0.5", "1", "1001", "nan", "x"),
    "student.guidance.interval": ("1 0.5", "-1 1", "0 2", "nan 1", "1"),
    "student.mid-times": ("1.5 1.5", "1.0 1.4", "1.57", "1.5 0", "-1", "nan", "x"),
}
FLAGS = {
    *("student.alternate", "student.rollout-at-mid-times"),
    *("model.double-norm", "model.learned-weight"),
    *("model.null-class", "model.guidance-input", "model.auxiliary-head"),
}

RCM = ("--method", "rcm")  # the method with the most options


@pytest.fixture(autouse=True)
def _train_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """If an option is accepted, the command ends with status 0 instead of training."""
    monkeypatch.setattr(run, "open_run_folder", lambda *arguments: nullcontext())
    monkeypatch.setattr(run, "_explained", lambda folder: nullcontext())
    monkeypatch.setattr(run, "run_from_scratch", lambda *arguments: None)


def options_of(settings: dict, prefix: str = "") -> list[str]:
    names: list[str] = []
    for name, value in settings.items():
        inner = f"{prefix}{name}".replace("_", "-")
        names += options_of(value, f"{inner}.") if isinstance(value, dict) else [inner]
    return names


def test_the_table_has_every_option() -> None:
    settings = asdict(PRESETS["digits"].config("rcm"))
    assert {"preset", "method", "teacher-run", *VALUES, *FLAGS} == set(options_of(settings))


@pytest.mark.parametrize("option", VALUES)
def test_a_value_that_is_not_allowed_is_rejected(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    for value in VALUES[option]:
        assert train.main([*RCM, f"--{option}", *(value.split() or [""])]) == 2, value
        assert f"--{option}" in one_line_of(capsys), value
        assert list(tmp_path.iterdir()) == [], value


@pytest.mark.parametrize("flag", sorted(FLAGS))
def test_a_flag_takes_no_value(
    flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert train.main([*RCM, f"--{flag}", "x"]) == 2
    assert "Unrecognized options: x" in one_line_of(capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["digts"], "unknown preset 'digts'; perhaps you meant 'digits'. Presets: digits"),
        (["--method", "rmc"], "unknown method 'rmc'; perhaps you meant 'rcm'. Methods: rcm, "),
        (["--method=x"], "unknown method 'x'. Methods: rcm, "),
        (["digits", "x"], "Unrecognized options: x"),
        (["--folder"], "Missing value for argument '--folder'"),
        (["--dry-run", "yes"], "Unrecognized options: yes"),
        (["--student.optimizer.lrr", "1"], "; perhaps you meant --student.optimizer.lr\n"),
        (["--seed", "one"], "--seed is 'one'; it must be an integer"),
        (
            ["--on-collapse", "go"],
            "invalid choice 'go' for argument '--on-collapse'. Expected one of",
        ),
        (["wan-tiny", "--on-collapse", "continue"], "Unrecognized options: --on-collapse"),
        (["--teacher.ema.std", "x"], "--teacher.ema.std is 'x'; it must be a number"),
        (["--model.heads", "3"], "--model.heads is 3; it must divide dim, which is 64"),
        (["--model.dim", "0"], "--model.dim is 0; it must be an integer in 1..65536"),
        ([*RCM, "--student.sigma-max", "1"], "from below atan(sigma_max) = 0.7854 to above 0"),
        (
            [*RCM, "--student.critic-optimizer.weight-decay", "-1"],
            "--student.critic-optimizer.weight-decay is -1.0; it must be a number in [0, inf)",
        ),
        (
            ["--student.batch", "6", "--accumulation", "4"],
            "--student.batch is 6; it must be a multiple of 4, data-parallel ranks × "
            "--accumulation = 1 × 4",
        ),
        (["--mesh.shard", "2"], "the mesh has replicate × shard × ring × ulysses = 1 × 2 × 1 × 1"),
        (["--mesh.ring", "2"], "mesh.ring × mesh.ulysses is 2; it must be 1"),
        (
            ["--model.dim", "65536", "--model.depth", "99"],
            "model is too large: its training needs at least",
        ),
    ],
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_the_message_says_what_is_allowed(
    argv: list[str],
    message: str,
    dry_run: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert train.main([*argv, *(["--dry-run"] if dry_run else [])]) == 2
    assert message in one_line_of(capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_without_a_temporary_folder_is_rejected(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def missing() -> None:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr("tempfile.TemporaryDirectory", missing)
    assert train.main(["--dry-run"]) == 2
    assert "No usable temporary directory" in one_line_of(capsys)


@pytest.mark.parametrize(
    "command",
    [("rcm.train", "--model.heads", "3"), ("rcm.sample", "missing", "--steps", "0")],
)
def test_a_process_with_an_invalid_option_exits_with_status_2(
    command: tuple[str, ...], tmp_path: Path
) -> None:
    environment = {"PYTHONPATH": str(Path(train.__file__).parents[1])}
    result = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {command[-2]} is {command[-1]}; it must ")
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
