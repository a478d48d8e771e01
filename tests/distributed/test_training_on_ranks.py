"""`python -m rcm.train` under torchrun: what it prints, and what ends with a dead rank."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import pytest

from tests.distributed.launched_ranks import is_running
from tests.distributed.launched_training import (
    LIMIT,
    TorchrunRanks,
    finished_checkpoints,
)

pytestmark = [pytest.mark.xdist_group("ranks"), pytest.mark.slow]

HOST = socket.gethostname()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


def torchrun(folder: Path, *options: str) -> TorchrunRanks:
    arguments = ["wan-tiny", "--folder", str(folder), "--mesh.ulysses", "2", *options]
    return TorchrunRanks("rcm.train", arguments, folder.with_name("output"), "--standalone")


def wait_for_a_checkpoint(folder: Path) -> None:
    deadline = time.monotonic() + LIMIT
    while not finished_checkpoints(folder):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_two_ranks_print_each_line_once(folder: Path) -> None:
    ranks = torchrun(folder, "--student.iterations", "2")
    assert ranks.codes() == [0]
    last = folder / "checkpoints" / "student-0000002"
    assert ranks.output.read_text() == (
        "next: student (rcm), 2 iterations of 4\n"
        f"finished 2 iterations; the last intact checkpoint is {last}\n"
    )


def test_a_dry_run_of_two_ranks_leaves_nothing(folder: Path) -> None:
    ranks = torchrun(folder, "--dry-run")
    assert ranks.codes() == [0], ranks.output.read_text()
    assert ranks.output.read_text().splitlines()[-1] == "dry run: everything was built and works"
    assert [path.name for path in folder.parent.iterdir()] == ["output"]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_run_and_is_named(folder: Path, victim: int) -> None:
    ranks = torchrun(folder)
    wait_for_a_checkpoint(folder)
    pids = ranks.pids
    ranks.kill(victim)
    assert ranks.codes() == [1]
    output = ranks.output.read_text()
    assert f"rank      : {victim} (local_rank: {victim})" in output
    assert f"exitcode  : -9 (pid: {pids[victim]})" in output
    assert "[rank" not in output  # a traceback of a rank
    assert not any(map(is_running, pids))


@pytest.mark.parametrize("victim", [None, 0, 1])
def test_an_interrupt_says_how_to_continue(folder: Path, victim: int | None) -> None:
    """The rank that is not interrupted waits in a collective, where no Python code runs."""
    ranks = torchrun(folder)
    wait_for_a_checkpoint(folder)
    pids = ranks.pids
    os.kill(ranks.process.pid if victim is None else pids[victim], signal.SIGINT)
    assert ranks.codes() != [0]
    output = ranks.output.read_text()
    assert output.count("\ninterrupted; the last intact checkpoint is ") == 1
    assert output.count("; repeat the command to continue\n") == 1
    assert "[rank" not in output
    assert not any(map(is_running, pids))
