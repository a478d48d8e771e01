"""A run of 200 iterations survives whatever a machine does to its ranks and its disk.

It ends with the same bytes as an undisturbed run, and never loses a finished checkpoint.
"""

from __future__ import annotations

import itertools
import random
import resource
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from rcm.training.manifest import Checkpoint
from tests.distributed.launched_training import (
    LIMIT,
    PROGRAM,
    ForkedRanks,
    TorchrunRanks,
    finished_checkpoints,
    iterations,
)

pytestmark = [pytest.mark.xdist_group("ranks"), pytest.mark.slow]

ITERATIONS, FEW, CHECKPOINT_EVERY = 200, 16, 4
SEED = 16
# Three tokens for two ranks, and a tiny network: what counts are the processes and the files.
OPTIONS = [
    "wan-tiny",
    *("--mesh.ulysses", "2", "--student.batch", "1", "--data.sample-shape", "4", "1", "2", "6"),
    *("--checkpoint-every", str(CHECKPOINT_EVERY)),
]
Ranks = ForkedRanks | TorchrunRanks


def arguments(folder: Path, count: int) -> list[str]:
    return [*OPTIONS, "--folder", str(folder), "--student.iterations", str(count)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run on the same ranks."""
    folder = tmp_path_factory.mktemp("undisturbed")
    ranks = ForkedRanks(arguments(folder / "run", ITERATIONS), folder / "output")
    assert ranks.codes() == [0, 0], ranks.output.read_text()
    assert iterations(folder / "run") == ITERATIONS
    return folder / "run"


class Soak:
    """A run that is killed and started again; it notes which checkpoints were finished."""

    def __init__(self, folder: Path, outputs: Path, count: int) -> None:
        self.folder, self.outputs = folder / "run", outputs
        self.arguments = arguments(self.folder, count)
        self.newest, self.legs, self.leftovers = 0, 0, 0

    def start(self, launch: Callable[[list[str], Path], Ranks]) -> Ranks:
        self.legs += 1
        return launch(self.arguments, self.outputs / f"{self.legs:02d}.txt")

    def watch(self, ranks: Ranks, moment: Callable[[], bool]) -> None:
        """Wait for a moment, or the end of a rank."""
        deadline = time.monotonic() + LIMIT
        while not moment() and not ranks.has_ended():
            assert time.monotonic() < deadline, ranks.output.read_text()
            self.note_finished()
            time.sleep(0.001)
        self.note_finished()

    def note_finished(self) -> None:
        self.newest = max(self.newest, *finished_checkpoints(self.folder), 0)

    def require_nothing_lost(self, ranks: Ranks) -> None:
        """All complete checkpoints are intact, and none is older than one that was seen."""
        found = finished_checkpoints(self.folder)
        assert max(found, default=0) >= self.newest
        for path in found.values():
            checkpoint = Checkpoint.open(path)
            checkpoint.require_intact(checkpoint.files)
        self.leftovers += len(list((self.folder / "checkpoints").glob(".*")))

    def is_saving(self) -> bool:
        return any((self.folder / "checkpoints").glob(".*.partial"))


def torchrun(arguments: list[str], output: Path) -> Ranks:
    return TorchrunRanks(PROGRAM, arguments, output, "--standalone")


def moments(soak: Soak, kind: str, chance: random.Random) -> Callable[[], bool]:
    """A random moment of a kind: while ranks start, while they train, or while they save."""
    if kind == "start":
        end = time.monotonic() + chance.uniform(0, 1.5)
        return lambda: time.monotonic() > end
    last = iterations(soak.folder) + chance.randint(1, 30)
    if kind == "training":
        return lambda: iterations(soak.folder) >= last
    return lambda: iterations(soak.folder) >= last and soak.is_saving()


def test_killed_ranks_lose_nothing(undisturbed: Path, tmp_path: Path) -> None:
    chance = random.Random(SEED)
    disturbances = [
        *itertools.product(("training", "save"), ((0, 1), (0,), (1,))),
        *[("start", (0, 1))] * 2,
    ]
    chance.shuffle(disturbances)
    soak = Soak(tmp_path, tmp_path, ITERATIONS)
    for kind, victims in disturbances:
        uses_torchrun = (kind, victims) == ("training", (1,))
        ranks = soak.start(torchrun if uses_torchrun else partial(ForkedRanks, soon=True))
        soak.watch(ranks, moments(soak, kind, chance))
        time.sleep(chance.uniform(0, 0.02 if kind == "save" else 0.2))
        ranks.kill(*victims)
        assert 0 not in ranks.codes(), ranks.output.read_text()
        soak.require_nothing_lost(ranks)
    ranks = soak.start(torchrun)
    assert ranks.codes() == [0], ranks.output.read_text()
    assert f"at iteration {soak.newest}" in ranks.output.read_text()
    for name in ("metrics.jsonl", "config.json"):
        assert (soak.folder / name).read_bytes() == (undisturbed / name).read_bytes(), name
    last, expected = (finished_checkpoints(f)[ITERATIONS] for f in (soak.folder, undisturbed))
    assert Checkpoint.open(last).manifest == Checkpoint.open(expected).manifest


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Write a file until the disk is full."""
    path = folder / "filler"
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    return path


def assert_stopped_and_continues(soak: Soak, ranks: Ranks, free: Callable[[], None]) -> None:
    """The ranks stop with a message, and the same command continues after space was freed."""
    assert ranks.codes() == [1, 1], ranks.output.read_text()
    output = ranks.output.read_text()
    assert "a file cannot be read or written: [Errno " in output
    assert "Free some space or repair the file system and repeat the command; the last" in output
    assert "Traceback" not in output
    soak.require_nothing_lost(ranks)
    assert soak.leftovers == 0
    free()
    ranks = soak.start(ForkedRanks)
    assert ranks.codes() == [0, 0], ranks.output.read_text()


def first_lines(folder: Path, count: int) -> list[bytes]:
    return (folder / "metrics.jsonl").read_bytes().splitlines()[:count]


def test_a_full_disk_stops_all_ranks_and_loses_nothing(
    undisturbed: Path, small_disk: Path, tmp_path: Path
) -> None:
    soak = Soak(small_disk, tmp_path, FEW)
    ranks = soak.start(ForkedRanks)
    soak.watch(ranks, lambda: soak.newest > 0)
    filler = fill(small_disk)
    assert_stopped_and_continues(soak, ranks, filler.unlink)
    assert first_lines(soak.folder, FEW) == first_lines(undisturbed, FEW)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_cannot_write_stops_all_ranks_and_loses_nothing(
    undisturbed: Path, tmp_path: Path, rank: int
) -> None:
    soak = Soak(tmp_path, tmp_path, FEW)
    ranks = soak.start(ForkedRanks)
    soak.watch(ranks, lambda: soak.newest > 0)
    resource.prlimit(ranks.pids[rank], resource.RLIMIT_FSIZE, (1000, 1000))
    assert_stopped_and_continues(soak, ranks, lambda: None)
    assert first_lines(soak.folder, FEW) == first_lines(undisturbed, FEW)
