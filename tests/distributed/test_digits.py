"""Runs of the digits on two ranks: the losses of one process, files written once, one message."""

import json
import re
from pathlib import Path

import pytest

from rcm import train
from tests.distributed.digits_ranks import start_on_ranks, train_with_a_bad_sample
from tests.rcm.commands.tiny_run import assert_equal_up_to_rounding, metrics, small_data

pytestmark = pytest.mark.xdist_group("ranks")

TINY = [
    *("--model.dim", "16", "--model.depth", "1", "--model.heads", "2"),
    *("--teacher.iterations", "2", "--teacher.batch", "8"),
    *("--student.iterations", "4", "--student.batch", "8", "--student.tangent-warmup", "2"),
    *("--probe-every", "2", "--report-every", "100", "--checkpoint-every", "3"),
]
# The losses of these call a weight w(t) and a second output of the student beside its forward.
RUNS = {
    "rcm": ["--method", "rcm", "--student.critic-start", "1", "--model.learned-weight"],
    "imeanflow": ["--method", "imeanflow", "--student.guidance.max-scale", "3"],
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of runs by one process, alone/NAME, and by two ranks, ranks/NAME."""
    root = tmp_path_factory.mktemp("digits")
    ranks = root / "ranks"
    ranks.mkdir()
    runs = [
        *((train.main, ["--folder", str(ranks / name), *TINY, *RUNS[name]]) for name in RUNS),
        (train.main, ["--folder", str(ranks / "not-divided"), "--student.batch", "9"]),
        (train_with_a_bad_sample, ["--folder", str(ranks / "bad-sample"), *TINY]),
    ]
    codes = start_on_ranks(runs, 2, root)
    assert codes == [[0, 0, 2, 1]] * 2, [path.read_text() for path in root.glob("*.err")]
    with small_data():
        for name, options in RUNS.items():
            assert train.main(["--folder", str(root / "alone" / name), *TINY, *options]) == 0
    return root


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_compute_the_metrics_of_one_process(root: Path, name: str) -> None:
    alone, ranks = (metrics(root / folder / name) for folder in ("alone", "ranks"))
    assert_equal_up_to_rounding(ranks, alone)


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_write_the_files_of_one_process(root: Path, name: str) -> None:
    alone, ranks = (root / folder / name for folder in ("alone", "ranks"))
    assert {path.name for path in ranks.iterdir()} == {path.name for path in alone.iterdir()}
    reports = [json.loads((folder / "report.json").read_text()) for folder in (alone, ranks)]
    assert reports[1].keys() == reports[0].keys()
    assert reports[1]["scores"].keys() == reports[0]["scores"].keys()


def test_each_error_is_printed_once(root: Path) -> None:
    lines = [(root / f"{rank}.err").read_text().splitlines() for rank in range(2)]
    errors = [line for line in lines[0] if line.startswith("error: ")]
    assert errors[0] == (
        "error: --student.batch is 9; it must be a multiple of 2, data-parallel ranks × "
        "--accumulation = 2 × 1"
    )
    assert re.fullmatch(
        r"error: rank 1 on \S+: sample \d+ cannot be read; the last intact checkpoint is .*",
        errors[1],
    )
    assert len(errors) == 2
    assert not any(line.startswith(("error: ", "Traceback")) for line in lines[1])


def test_a_batch_that_the_ranks_do_not_divide_creates_no_folder(root: Path) -> None:
    assert not (root / "ranks" / "not-divided").exists()
