"""A file is either the old one or the whole new one."""

from pathlib import Path

import pytest
import torch

from rcm.errors import RunError
from rcm.training.files import load_weights, save_weights, write_atomically


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
    path, weights = tmp_path / "weights.safetensors", {"weights": torch.full((100,), 4.0)}
    with pytest.raises(RunError, match="does not exist"):
        load_weights(path)
    save_weights(path, weights)
    assert torch.equal(load_weights(path)["weights"], weights["weights"])
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(RunError, match="damaged"):
        load_weights(path)
