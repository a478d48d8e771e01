"""Options of a tiny run, and helpers to start it and read what it wrote."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rcm import train
from rcm.data.classifier import train_classifier
from rcm.data.dataset import Dataset
from rcm.data.digits import DigitsConfig, load_digits
from rcm.training.trainer import Trainer

ANY_METHOD = [
    *("--model.dim", "16", "--model.depth", "1", "--model.heads", "2"),
    *("--student.iterations", "10", "--student.batch", "16"),
    *("--report-every", "5", "--checkpoint-every", "4"),
]
TINY = [
    *ANY_METHOD,
    *("--method", "rcm", "--teacher.iterations", "12", "--teacher.batch", "16"),
    *("--student.tangent-warmup", "4", "--student.critic-start", "2"),
]

# An interrupted run ends in the same bytes of these.
RESULTS = ("metrics.jsonl", "student.safetensors", "report.json")


@contextmanager
def small_data() -> Iterator[None]:
    """200 of the digits, and one classifier for every run inside this process."""
    digits = load_digits()
    few = Dataset(digits.samples[:200], digits.labels[:200], digits.classes)
    classifier = train_classifier(few, steps=20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DigitsConfig, "load", lambda self: few)
        patch.setattr(DigitsConfig, "classifier", lambda self, data: classifier)
        yield


def start(folder: Path, *options: str) -> int:
    return train.main(["--folder", str(folder), *TINY, *options])


def start_method(folder: Path, method: str, teacher: Path, *options: str) -> int:
    """A run of any method with the teacher of another run."""
    run = ["--method", method, "--teacher", str(teacher), "--folder", str(folder)]
    return train.main([*run, *ANY_METHOD, *options])


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_equal_up_to_rounding(found: list[dict], expected: list[dict]) -> None:
    """Compare lines of metrics."""
    for now, other in zip(found, expected, strict=True):
        assert now.keys() == other.keys()
        for name, value in other.items():
            if isinstance(value, float):
                # A central difference, which is part of the cosine, amplifies rounding.
                bounds = {"abs": 1e-2} if name == "jvp_cosine" else {"rel": 1e-5, "abs": 1e-9}
                assert now[name] == pytest.approx(value, **bounds), (name, other)
            else:
                assert now[name] == value, (name, other)


def error_of(capsys: pytest.CaptureFixture) -> str:
    """What was printed to stderr, in one line without tyro's frames."""
    text: str = capsys.readouterr().err
    assert "Traceback" not in text
    return " ".join(text.replace("│", " ").split())


def one_line_of(capsys: pytest.CaptureFixture) -> str:
    """What was printed to stderr, which is one line."""
    line: str = capsys.readouterr().err
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    return line


def stop_at(
    patch: pytest.MonkeyPatch, phase: str, iteration: int, error: type[BaseException]
) -> None:
    """Raise the error in place of an iteration of a phase: 1, 2, ..."""
    step = Trainer.step

    def stopped(self: Trainer) -> dict[str, float]:
        if self.name == phase and self.iteration + 1 == iteration:
            raise error
        return step(self)

    patch.setattr(Trainer, "step", stopped)


class Killed(BaseException):
    """Stands for the end of the process: nothing in the code under test catches it."""
