"""A checkpoint is either intact or rejected; a crash or a full disk at any moment loses none."""

from __future__ import annotations

import errno
import json
import os
import pickle
import resource
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from rcm.errors import RunError
from rcm.training import checkpoint, tensor_shards
from rcm.training.checkpoint import Checkpoints
from rcm.training.manifest import Checkpoint

PHASES = ("teacher", "student")
SHARD = "shard-00000-of-00001.safetensors"


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", PHASES)


def state(value: float) -> dict[str, Tensor]:
    return {"weights": torch.full((100,), float(value)), "iteration": torch.tensor(int(value))}


def save(checkpoints: Checkpoints, phase: str, iteration: int, value: float | None = None) -> Path:
    value = iteration if value is None else value
    checkpoints.save(phase, iteration, state(value), {"value": value})
    checkpoints.finish()
    return checkpoints.folder / f"{phase}-{iteration:07d}"


def load(checkpoints: Checkpoints, found: Checkpoint | None) -> float:
    """The value with which the state was saved."""
    assert found is not None
    tensors = state(0)
    checkpoints.load(found, tensors)
    value = tensors["weights"][0].item()
    assert tensors["weights"].eq(value).all()
    assert found.facts == {"value": value}
    return value


def names(checkpoints: Checkpoints) -> list[str]:
    return sorted(path.name for path in checkpoints.folder.iterdir())


# ----------------------------------------------------------------------------
# What is saved is loaded


def test_the_newest_checkpoint_is_the_last_of_the_last_phase(checkpoints: Checkpoints) -> None:
    assert checkpoints.latest() == (None, [])
    first = save(checkpoints, "teacher", 9, 1)
    second = save(checkpoints, "teacher", 10, 2)
    assert load(checkpoints, checkpoints.latest()[0]) == 2
    third = save(checkpoints, "student", 5, 3)  # a later phase, though fewer iterations
    found, problems = checkpoints.latest()
    assert load(checkpoints, found) == 3
    assert problems == []
    assert found is not None
    assert (found.manifest.phase, found.manifest.iteration) == ("student", 5)
    assert checkpoints.paths() == [third, second]
    assert checkpoints.paths(before=("student", 5)) == [second]
    assert checkpoints.paths(before=("student", 6)) == [third, second]
    assert checkpoints.paths(before=("teacher", 10)) == []
    assert not first.exists()


def test_every_dtype_and_shape_is_restored_exactly(checkpoints: Checkpoints) -> None:
    numbers = torch.arange(24.0).reshape(2, 3, 4) / 7
    tensors = {f"of {dtype}": (numbers * 9).to(dtype) for dtype in tensor_shards.DTYPES}
    tensors |= {
        "scalar": torch.tensor(1 / 3, dtype=torch.float64),
        "integer": torch.tensor(2**62 + 1),
        "empty": torch.empty(0, 3),
        "transposed": numbers.transpose(0, 2),
        "one byte": torch.tensor([7], dtype=torch.uint8),
        "nonfinite": torch.tensor([torch.nan, torch.inf, -0.0]),
        "parameter": nn.Parameter(numbers.clone()),
    }
    checkpoints.save("teacher", 1, tensors, {"nested": {"list": [1, 2.5, None, "text"]}})
    found, _ = checkpoints.latest()
    assert found is not None
    restored = {name: torch.zeros_like(x) for name, x in tensors.items()}
    restored["parameter"] = nn.Parameter(torch.zeros(2, 3, 4))
    checkpoints.load(found, restored)
    for name, x in tensors.items():
        assert bits(restored[name]) == bits(x), name
    assert found.facts == {"nested": {"list": [1, 2.5, None, "text"]}}
    content = (found.path / SHARD).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert length % 8 == 0
    assert all(header[n]["data_offsets"][0] % x.itemsize == 0 for n, x in tensors.items())


def bits(x: Tensor) -> bytes:
    return x.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_files_are_plain_safetensors_that_torch_reads_too(checkpoints: Checkpoints) -> None:
    path = save(checkpoints, "teacher", 3)
    assert load_file(path / SHARD)["weights"].eq(3).all()
    tensors = state(0)
    dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True)
    assert tensors["weights"].eq(3).all()
    assert tensors["iteration"] == 3


def test_training_goes_on_while_it_saves(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, facts, changed = state(1), {"value": 1}, threading.Event()
    write = checkpoint.write_pieces

    def late(*arguments: Any) -> str:
        assert changed.wait(60)
        return write(*arguments)

    monkeypatch.setattr(checkpoint, "write_pieces", late)
    checkpoints.save("teacher", 1, tensors, facts)
    tensors["weights"].fill_(2)
    facts["value"] = 2
    assert checkpoints.paths() == []
    changed.set()
    assert load(checkpoints, checkpoints.latest()[0]) == 1


@pytest.mark.parametrize(
    ("tensors", "facts", "message"),
    [
        ({"lr": 0.1}, {}, "lr is of type float; save a tensor instead"),
        ({"z": torch.zeros(2, dtype=torch.complex64)}, {}, "z has dtype torch.complex64; supp"),
        ({}, {"rng": {1, 2}}, "set is not JSON serializable"),
    ],
)
def test_what_is_neither_a_tensor_nor_json_is_refused(
    checkpoints: Checkpoints, tensors: dict, facts: dict, message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        checkpoints.save("teacher", 1, tensors, facts)
    with pytest.raises(ValueError, match="phase is 'critic'; it must be one of teacher, student"):
        checkpoints.save("critic", 1, {}, {})
    checkpoints.finish()
    assert names(checkpoints) == []


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for keep in (1, 2, 3):
        checkpoints = Checkpoints(tmp_path / str(keep), PHASES, keep=keep)
        for iteration in range(1, 6):
            save(checkpoints, "teacher", iteration)
        assert names(checkpoints) == [f"teacher-{i:07d}" for i in range(6 - keep, 6)]
    with pytest.raises(ValueError, match="keep is 0"):
        Checkpoints(tmp_path, PHASES, keep=0)


def test_saving_again_replaces_a_checkpoint_and_deletes_those_after_it(
    checkpoints: Checkpoints,
) -> None:
    """So does a run that resumed from an earlier checkpoint because a newer one was damaged."""
    for iteration in (1, 2):
        save(checkpoints, "teacher", iteration)
    save(checkpoints, "teacher", 1, 7)
    assert names(checkpoints) == ["teacher-0000001"]
    assert load(checkpoints, checkpoints.latest()[0]) == 7


# ----------------------------------------------------------------------------
# Damage


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)


def change_fact(path: Path) -> None:
    manifest = json.loads(path.read_text())
    manifest["facts"]["value"] += 1
    path.write_text(json.dumps(manifest))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "has .* bytes instead of": lambda path: os.truncate(path / SHARD, 600),
    "has 0 bytes": lambda path: (path / SHARD).write_bytes(b""),
    "SHA-256 differs": lambda path: flip_bit(path / SHARD),
    "No such file": lambda path: (path / SHARD).unlink(),
    "manifest.json cannot be read.*No such file": lambda path: (path / "manifest.json").unlink(),
    "manifest.json cannot be read": lambda path: (path / "manifest.json").write_text("[]"),
    "manifest.json was changed": lambda path: change_fact(path / "manifest.json"),
    "Is a directory": lambda path: [(path / SHARD).unlink(), (path / SHARD).mkdir()],
}


@pytest.mark.parametrize("message", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_previous_one_used(
    checkpoints: Checkpoints, message: str
) -> None:
    save(checkpoints, "teacher", 1)
    path = save(checkpoints, "teacher", 2)
    DAMAGE[message](path)
    found, problems = checkpoints.latest()
    assert load(checkpoints, found) == 1
    assert len(problems) == 1
    with pytest.raises(RunError, match=f"{path} is damaged: .*{message}"):
        checkpoints.verified(path)
    save(checkpoints, "teacher", 2, 5)
    assert load(checkpoints, checkpoints.latest()[0]) == 5


def test_if_every_checkpoint_is_damaged_loading_raises(checkpoints: Checkpoints) -> None:
    (save(checkpoints, "teacher", 1) / SHARD).write_bytes(b"")
    with pytest.raises(RunError, match="No intact checkpoint is left"):
        checkpoints.latest()


@pytest.mark.parametrize("name", ["manifest.json", SHARD])
def test_a_file_that_cannot_be_read_for_a_while_is_no_damage(
    checkpoints: Checkpoints, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise training would fall back, and the next save would delete an intact checkpoint."""
    save(checkpoints, "teacher", 1)
    path = save(checkpoints, "teacher", 2)
    read = Path.open

    def stale(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self == path / name:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(self))
        return read(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", stale)
        with pytest.raises(OSError, match=f"Stale file handle: .*{path / name}"):
            checkpoints.latest()
    assert load(checkpoints, checkpoints.latest()[0]) == 2


def test_a_damaged_checkpoint_is_not_kept_in_place_of_an_intact_one(
    checkpoints: Checkpoints,
) -> None:
    first, second = save(checkpoints, "teacher", 1), save(checkpoints, "teacher", 2)
    flip_bit(second / SHARD)
    checkpoints.latest()
    assert checkpoints.damaged == {second}
    save(checkpoints, "teacher", 3)
    assert names(checkpoints) == [first.name, "teacher-0000003"]


def test_a_file_that_vanishes_after_it_was_verified_raises(checkpoints: Checkpoints) -> None:
    path = save(checkpoints, "teacher", 1)
    found, _ = checkpoints.latest()
    assert found is not None
    (path / SHARD).write_bytes(b"\0" * 100)
    with pytest.raises(RunError, match=r"cannot be loaded: .* is damaged"):
        checkpoints.load(found, state(0))
    (path / SHARD).unlink()
    with pytest.raises(RunError, match=r"cannot be loaded: .*No such file"):
        checkpoints.load(found, state(0))


def test_a_manifest_that_lists_too_few_files_leaves_no_zeros(checkpoints: Checkpoints) -> None:
    save(checkpoints, "teacher", 1)
    found, _ = checkpoints.latest()
    assert found is not None
    found.manifest.files.clear()
    with pytest.raises(RunError, match="the files lack elements of weights, iteration"):
        checkpoints.load(found, state(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": torch.zeros(99)}, r"weights is float32 \(100,\) there, float32 \(99,\) here"),
        ({"weights": torch.zeros(100).bfloat16()}, r"float32 \(100,\) there, bfloat16 \(100,\)"),
        ({"more": torch.zeros(2, 3)}, r"more is absent there, float32 \(2, 3\) here"),
        ({"weights": None}, r"weights is float32 \(100,\) there, absent here"),
        ({str(i): torch.zeros(()) for i in range(9)}, "2 is absent there, float32 .*; 6 more"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_before_anything_is_loaded(
    checkpoints: Checkpoints, change: dict, message: str
) -> None:
    save(checkpoints, "teacher", 1)
    found, _ = checkpoints.latest()
    assert found is not None
    tensors = {name: x for name, x in {**state(0), **change}.items() if x is not None}
    with pytest.raises(RunError, match=f"is of another preset or model: .*{message}"):
        checkpoints.load(found, tensors)
    assert all(not x.any() for x in tensors.values())


class Payload:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable, tuple]:
        return Path.touch, (self.path,)


def test_pickles_are_never_read(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(checkpoints, "teacher", 1)
    path = save(checkpoints, "teacher", 2)
    planted = pickle.dumps(Payload(tmp_path / "executed"))
    for name in (".metadata", "__0_0.distcp", "state.pt", "extra.safetensors"):
        (path / name).write_bytes(planted)
    for function in ("pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load"):
        monkeypatch.setattr(function, None)
    assert load(checkpoints, checkpoints.latest()[0]) == 2
    (path / SHARD).write_bytes(planted)
    assert load(checkpoints, checkpoints.latest()[0]) == 1
    assert not (tmp_path / "executed").exists()


# ----------------------------------------------------------------------------
# Crashes and full disks

OPERATIONS = ("mkdir", "fsync", "rename", "unlink", "rmdir")


class Killed(BaseException):
    """In place of a kill -9: nothing is cleaned up."""


@contextmanager
def stopped_at(operation: int, error: BaseException) -> Iterator[list[str]]:
    """Raise the error in place of a file operation: 0, 1, ... Yields those that were done."""
    done: list[str] = []

    def counted(name: str, function: Callable) -> Callable:
        def call(*arguments: Any, **options: Any) -> Any:
            if len(done) == operation:
                done.append(f"no {name}")
                raise error
            done.append(name)
            return function(*arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in OPERATIONS:
            patch.setattr(os, name, counted(name, getattr(os, name)))
        yield done


@pytest.mark.parametrize("keep", [1, 2])
def test_a_kill_at_any_moment_of_a_save_leaves_a_finished_checkpoint(
    tmp_path: Path, keep: int
) -> None:
    last = 0
    for operation in range(100):
        checkpoints = Checkpoints(tmp_path, PHASES, keep=keep)
        assert not list(tmp_path.glob(".*"))
        save(checkpoints, "teacher", last + 1)
        save(checkpoints, "teacher", last + 2)
        with stopped_at(operation, Killed()) as done:
            checkpoints.save("teacher", last + 3, state(last + 3), {"value": last + 3})
            try:
                checkpoints.finish()
            except Killed:
                pass
            else:
                break
        found, problems = Checkpoints(tmp_path, PHASES, keep=keep).latest()
        assert problems == []
        last += 3 if "rename" in done else 2
        assert load(checkpoints, found) == last
    assert operation == len(done) > 6
    assert done.count("rename") == 2  # of the new one, and of the one to delete


def test_a_full_disk_at_any_moment_keeps_the_finished_checkpoint(checkpoints: Checkpoints) -> None:
    save(checkpoints, "teacher", 1)
    for operation in range(5):  # up to the renaming
        error = OSError(errno.ENOSPC, "No space left on device")
        with stopped_at(operation, error) as done:
            checkpoints.save("teacher", 2, state(2), {"value": 2})
            with pytest.raises(OSError, match="No space left"):
                checkpoints.finish()
        checkpoints.finish()  # the error was reported once
        assert names(checkpoints) == ["teacher-0000001"], done
        assert load(checkpoints, checkpoints.latest()[0]) == 1
    save(checkpoints, "teacher", 2)
    assert load(checkpoints, checkpoints.latest()[0]) == 2


def test_the_next_save_reports_the_failure_of_the_one_before(checkpoints: Checkpoints) -> None:
    with stopped_at(1, OSError(errno.EIO, "Input/output error")):
        checkpoints.save("teacher", 1, state(1), {})
        with pytest.raises(OSError, match="Input/output error"):
            checkpoints.save("teacher", 2, state(2), {})


def test_a_file_that_cannot_grow_keeps_the_finished_checkpoint(checkpoints: Checkpoints) -> None:
    """A write that really fails, halfway through the file."""
    save(checkpoints, "teacher", 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    try:
        checkpoints.save("teacher", 2, {"weights": torch.zeros(100_000)}, {})
        with pytest.raises(OSError, match="File too large"):
            checkpoints.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(checkpoints) == ["teacher-0000001"]
    assert load(checkpoints, checkpoints.latest()[0]) == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    command = [str(mount), "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if mount is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full_keeps_the_finished_checkpoint(small_disk: Path) -> None:
    checkpoints = Checkpoints(small_disk / "checkpoints", PHASES)
    weights = torch.arange(100_000.0)
    for iteration in (1, 2, 3):  # the disk holds two of them
        checkpoints.save("teacher", iteration, {"weights": iteration * weights}, {})
        if iteration < 3:
            checkpoints.finish()
    with pytest.raises(OSError, match="No space left on device"):
        checkpoints.finish()
    found, problems = checkpoints.latest()
    assert found is not None
    assert found.path.name == "teacher-0000002"
    assert problems == []
    restored = {"weights": torch.zeros(100_000)}
    checkpoints.load(found, restored)
    assert torch.equal(restored["weights"], 2 * weights)
