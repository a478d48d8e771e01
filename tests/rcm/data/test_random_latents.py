"""Random latents: real shards, repeatable, smooth and normalised."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rcm.data.latents import Latents, LatentsConfig
from rcm.data.random_latents import SAMPLES_PER_SHARD, write_random_latents

VIDEO, IMAGE = (4, 5, 12, 20), (3, 16, 16)
CONDITION = {"text": (6, 7), "pooled": (7,)}


def written(folder: Path, count: int, shape: tuple[int, ...], seed: int = 0) -> Latents:
    write_random_latents(folder, count, shape, CONDITION, seed)
    return LatentsConfig(folder=str(folder), sample_shape=shape, text_length=6).load(CONDITION)


@pytest.mark.parametrize("shape", [VIDEO, IMAGE], ids=["video", "image"])
def test_latents_are_normalised_and_smooth(shape: tuple[int, ...], tmp_path: Path) -> None:
    data = written(tmp_path, SAMPLES_PER_SHARD + 6, shape)
    assert len(data) == SAMPLES_PER_SHARD + 6
    x0, condition = data.batch(range(len(data)))
    assert abs(x0.mean()) < 1e-5
    assert abs(x0.std() - 1) < 0.02
    for dim in range(2, x0.ndim):
        differences = x0.diff(dim=dim)
        assert differences.std() < 0.9  # 1.41 for white noise
    assert x0.flatten(1).unique(dim=0).shape[0] == len(data)
    null = data.null_condition(condition)
    assert {name: tensor.shape[1:] for name, tensor in null.items()} == CONDITION


def test_only_the_seed_determines_the_samples(tmp_path: Path) -> None:
    first, second, other = (
        written(tmp_path / name, 5, VIDEO, seed).batch([4, 2])
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first[0].equal(second[0])
    assert first[1]["text"].equal(second[1]["text"])
    assert not torch.isclose(first[0], other[0]).any()
