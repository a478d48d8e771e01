"""A checkpoint resumes on any number of ranks and any mesh; a dead rank loses none."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from rcm.training.checkpoint import Checkpoints
from tests.distributed.checkpoint_cases import (
    PHASES,
    Named,
    Result,
    cases,
    other_tensors,
    resumed,
    trained,
)
from tests.distributed.ranks import run_on_ranks

pytestmark = pytest.mark.xdist_group("ranks")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of checkpoints; "1", "2" and "4" are those of so many ranks."""
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def of_one(folder: Path) -> Result:
    """Training in one process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    result = trained(Checkpoints(folder / "1", PHASES), None)
    torch.set_num_threads(threads)
    return result


@pytest.fixture(scope="module")
def of_two(
    folder: Path, of_one: Result, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """All cases on two ranks, which also resume the training of one process."""
    return run_on_ranks(partial(cases, folder=folder), 2, tmp_path_factory.mktemp("ranks"))


def assert_same(found: Result, expected: Result) -> None:
    """The state is bit-identical; the next losses are up to the order of sums."""
    assert found["state"].keys() == expected["state"].keys()
    for name, x in expected["state"].items():
        assert torch.equal(found["state"][name], x), name
    torch.testing.assert_close(found["losses"], expected["losses"])


def test_two_ranks_resume_to_the_same_bits(of_two: list[dict[str, Any]]) -> None:
    for results in of_two:
        before, after = results["training"]["trained"], results["training"]["2"]
        assert_same(after, before)
        assert torch.equal(after["losses"], before["losses"])


def test_two_ranks_resume_what_one_process_saved(
    of_one: Result, of_two: list[dict[str, Any]]
) -> None:
    for results in of_two:
        assert_same(results["training"]["1"], of_one)


def test_one_process_resumes_what_two_ranks_saved(
    folder: Path, of_two: list[dict[str, Any]]
) -> None:
    checkpoints = Checkpoints(folder / "2", PHASES)
    assert_same(resumed(checkpoints, None), of_two[0]["training"]["trained"])


def test_replicas_are_saved_once_and_loaded_on_another_mesh(
    folder: Path, of_two: list[dict[str, Any]]
) -> None:
    for results in of_two:
        assert_replicas_restored(results["replicas"])
    found = Checkpoints(folder / "with replicas", PHASES).latest()[0]
    assert found is not None
    assert len(found.files) == 2


def assert_replicas_restored(results: dict[str, Named]) -> None:
    for mesh in ("same mesh", "flattened mesh"):
        for name, x in results["expected"].items():
            assert torch.equal(results[mesh][name], x), (mesh, name)


def test_an_error_of_one_rank_is_raised_on_all_and_keeps_the_older_checkpoints(
    of_two: list[dict[str, Any]],
) -> None:
    outcome = of_two[0]["errors"]
    assert of_two[1]["errors"] == outcome
    assert outcome["first"] == outcome["second"] == "nothing"
    assert outcome["other tensors"].startswith("RunError: ")
    assert "All ranks must save the same tensors" in outcome["other tensors"]
    assert outcome["full disk"] == "OSError: [Errno 28] No space left on device"
    assert outcome["left"] == "teacher-0000001 teacher-0000002"
    assert "more is absent there, float32 (3,) here" in outcome["other model"]
    assert outcome["facts"] == "{'rank': 0}"
    assert outcome["older"] == "teacher-0000001"
    assert "shard-00001-of-00002.safetensors cannot be read" in outcome["problems"]


@pytest.mark.slow
def test_four_ranks_resume_what_two_saved_and_the_reverse(
    folder: Path, of_two: list[dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "4").mkdir()
    (tmp_path / "2").mkdir()
    for results in run_on_ranks(partial(cases, folder=folder), 4, tmp_path / "4"):
        of_four = results["training"]["trained"]
        assert_same(results["training"]["4"], of_four)
        assert_same(results["training"]["2"], of_two[0]["training"]["trained"])
        assert_replicas_restored(results["replicas"])
    for results in run_on_ranks(partial(cases, folder=folder), 2, tmp_path / "2"):
        assert_same(results["training"]["4"], of_four)


# ----------------------------------------------------------------------------
# kill -9


class Job:
    """Two ranks that save in a loop; one of them may kill itself in a save."""

    def __init__(self, folder: Path, *, dies_at: tuple[int, int] = (-1, -1)) -> None:
        (folder / "rendezvous").unlink(missing_ok=True)
        self.outputs = [folder / f"output {rank}" for rank in range(2)]
        self.processes = []
        for rank, output in enumerate(self.outputs):
            arguments = (str(rank), "2", str(folder), str(dies_at[rank]))
            command = [sys.executable, "-m", "tests.distributed.checkpoint_cases", *arguments]
            with open(output, "w") as file:
                self.processes.append(subprocess.Popen(command, stdout=file, stderr=file))

    def last(self) -> int:
        """The last iteration that a rank knows to be finished, or resumed from."""
        texts = [output.read_text() for output in self.outputs]
        lines = [line.split() for text in texts for line in text.splitlines()]
        numbers = [int(line[1]) for line in lines if line[0] in ("finished", "resumed")]
        return max(numbers, default=0)

    def kill(self) -> None:
        for process in self.processes:
            process.send_signal(signal.SIGKILL)
        for process in self.processes:
            process.wait()


def newest(folder: Path) -> int:
    """The iteration of the newest checkpoint, which is intact and has the right values."""
    checkpoints = Checkpoints(folder / "checkpoints", PHASES)
    found, problems = checkpoints.latest()
    assert problems == []
    if found is None:
        return 0
    expected = other_tensors(None, found.manifest.iteration)
    tensors = {name: torch.zeros_like(x) for name, x in expected.items()}
    checkpoints.load(found, tensors)
    assert all(torch.equal(x, expected[name]) for name, x in tensors.items())
    return found.manifest.iteration


def test_the_death_of_a_rank_in_a_save_ends_the_other_and_keeps_the_older_checkpoint(
    tmp_path: Path,
) -> None:
    job = Job(tmp_path, dies_at=(-1, 2))  # rank 1 dies in its third save
    try:
        codes = [process.wait(60) for process in job.processes]
    finally:
        job.kill()
    assert codes[1] == -signal.SIGKILL
    assert codes[0] == 1  # it did not hang
    assert "RuntimeError" in job.outputs[0].read_text()
    assert newest(tmp_path) == job.last() == 2


@pytest.mark.slow
def test_random_kills_never_lose_a_finished_checkpoint(tmp_path: Path) -> None:
    """Rank 0, rank 1 and both in turn, at random moments; the other one ends by itself."""
    moments, last = random.Random(0), 0
    for turn in range(3):
        job = Job(tmp_path)
        try:
            while job.last() <= last and all(p.poll() is None for p in job.processes):
                time.sleep(0.01)
            time.sleep(0.3 * moments.random())
            for rank in ((0,), (1,), (0, 1))[turn]:
                job.processes[rank].send_signal(signal.SIGKILL)
            codes = [process.wait(60) for process in job.processes]
        finally:
            job.kill()
        assert -signal.SIGKILL in codes
        outputs = [output.read_text() for output in job.outputs]
        assert not any("AssertionError" in text for text in outputs), outputs
        assert job.last() <= newest(tmp_path) <= job.last() + 1
        assert newest(tmp_path) > last
        last = newest(tmp_path)
