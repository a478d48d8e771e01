"""A checkpoint is either intact or rejected, and a failed write loses no data."""

from pathlib import Path

import pytest
import torch

from rcm.errors import RunError
from rcm.training.checkpoint import Checkpoints, load_weights, save_weights, write_atomically


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path, ("teacher", "student"))


def state(value: float) -> dict[str, torch.Tensor]:
    return {"weights": torch.full((100,), value)}


def value_of(checkpoint: dict | None) -> float:
    assert checkpoint is not None
    return checkpoint["weights"][0].item()


def test_the_newest_checkpoint_is_read_back(checkpoints: Checkpoints) -> None:
    assert checkpoints.latest() == (None, [])
    checkpoints.save("teacher", 9, state(1))
    checkpoints.save("teacher", 10, state(2))
    assert value_of(checkpoints.latest()[0]) == 2
    checkpoints.save("student", 5, state(3))  # a later phase, though fewer iterations
    assert value_of(checkpoints.latest()[0]) == 3


def test_only_the_newest_two_are_kept(checkpoints: Checkpoints) -> None:
    for iteration in range(1, 6):
        checkpoints.save("teacher", iteration, state(iteration))
    assert len(list(checkpoints.folder.iterdir())) == 4


@pytest.mark.parametrize("damage", ["truncated", "flipped bit", "emptied", "invalid record"])
def test_a_damaged_checkpoint_is_rejected_and_the_previous_one_used(
    checkpoints: Checkpoints, damage: str
) -> None:
    checkpoints.save("teacher", 1, state(1))
    path = checkpoints.save("teacher", 2, state(2))
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped bit":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "emptied":
        path.write_bytes(b"")
    else:
        path.with_suffix(".json").write_text("[]")
    checkpoint, problems = checkpoints.latest()
    assert value_of(checkpoint) == 1
    assert len(problems) == 1
    assert path.name in problems[0]


def test_if_every_checkpoint_is_damaged_loading_raises(
    checkpoints: Checkpoints,
) -> None:
    checkpoints.save("teacher", 1, state(1)).write_bytes(b"")
    with pytest.raises(RunError, match="No intact checkpoint is left"):
        checkpoints.latest()


def test_a_checkpoint_without_its_record_is_ignored(checkpoints: Checkpoints) -> None:
    checkpoints.save("teacher", 1, state(1))
    checkpoints.save("teacher", 2, state(2)).with_suffix(".json").unlink()
    assert value_of(checkpoints.latest()[0]) == 1


def test_a_failed_write_keeps_the_old_file_and_leaves_no_partial_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_weights_round_trip_and_damage_raises(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    with pytest.raises(RunError, match="does not exist"):
        load_weights(path)
    save_weights(path, state(4))
    assert torch.equal(load_weights(path)["weights"], state(4)["weights"])
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(RunError, match="damaged"):
        load_weights(path)
