"""What a user sees of `python -m rcm.sample`."""

from pathlib import Path

import pytest

from rcm import sample
from tests.rcm.commands.tiny_run import error_of

pytestmark = pytest.mark.xdist_group("train")


def test_sample_writes_a_grid(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "grid.png"
    arguments = [str(finished), "--steps", "2", "--num", "20", "--out", str(out)]
    assert sample.main(arguments) == 0
    assert out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--num", "7"], "multiple of 10"),
        (["--steps", "9"], "steps is 9"),
        (["--out", "/nowhere/grid.png"], "/nowhere/grid.png"),
    ],
)
def test_sample_rejects_invalid_options(
    finished: Path, options: list[str], words: str, capsys: pytest.CaptureFixture
) -> None:
    assert sample.main([str(finished), *options]) == 1
    assert words in error_of(capsys)


def test_sample_rejects_a_folder_without_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert sample.main([str(tmp_path)]) == 1
    assert "not a run folder" in error_of(capsys)
