"""The mesh gives every rank its samples and groups, and all ranks the same decisions."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rcm.distributed.layout import Layout, MeshConfig
from rcm.errors import OptionError
from tests.distributed.layout_cases import agreements, places
from tests.distributed.ranks import run_on_ranks

pytestmark = pytest.mark.xdist_group("ranks")


def test_every_sample_of_a_batch_has_one_group_of_ranks(tmp_path: Path) -> None:
    by_rank = run_on_ranks(places, 4, tmp_path)

    def of(name: str) -> list[list[int]]:
        return [found[name] for found in by_rank]

    assert of("dp4 samples") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert of("dp2 x U2 samples") == [[0, 1, 2, 3]] * 2 + [[4, 5, 6, 7]] * 2
    assert of("R2 x U2 samples") == [list(range(8))] * 4
    assert of("HSDP samples") == of("dp4 samples")
    assert of("HSDP x R2 samples") == of("dp2 x U2 samples")
    assert of("dp4 halves") == [[1, 1]] * 4
    assert of("dp4 context") == [[0], [1], [2], [3]]
    assert of("dp2 x U2 context") == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert of("R2 x U2 context") == [[0, 1, 2, 3]] * 4
    assert of("HSDP shard") == of("HSDP x R2 shard") == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert of("R2 x U2 shard") == [[0, 1, 2, 3]] * 4
    assert of("R2 x U2 mesh") == [[4]] * 4
    assert of("HSDP mesh") == [[2, 2]] * 4
    assert of("HSDP sum") == [[11], [11], [1100], [1100]]


def test_ranks_agree(tmp_path: Path) -> None:
    first, second = run_on_ranks(agreements, 2, tmp_path)
    assert first["mean"] == second["mean"] == "[0.5, 5.0]"
    assert first["all"] == second["all"] == "[True, False, False]"
    for kind in ("RunError", "OptionError", "OSError"):
        assert first[kind] == second[kind]
        assert re.fullmatch(rf"{kind}: rank 1 on \S+: of rank 1: größer", first[kind])
    assert first["TypeError"] == second["TypeError"]
    assert first["TypeError"].startswith("RuntimeError: rank 1 on ")
    assert "1 × 1 × 3 × 1 = 3 ranks, but the run has 2; change --mesh.*" in first["mesh"]


@pytest.mark.parametrize(
    ("config", "ranks", "sizes"),
    [
        (MeshConfig(), 1, (1, 1, 1, 1)),
        (MeshConfig(), 8, (1, 8, 1, 1)),
        (MeshConfig(replicate=2, ring=2, ulysses=4), 64, (2, 4, 2, 4)),
        (MeshConfig(shard=2, ulysses=2), 4, (1, 2, 1, 2)),
    ],
)
def test_shard_takes_the_ranks_that_are_left(
    config: MeshConfig, ranks: int, sizes: tuple[int, ...]
) -> None:
    assert config.sizes(ranks) == sizes


@pytest.mark.parametrize("config", [MeshConfig(shard=2), MeshConfig(ring=2), MeshConfig(ulysses=3)])
def test_a_mesh_that_does_not_fit_the_ranks_raises(config: MeshConfig) -> None:
    with pytest.raises(OptionError, match=r"ranks, but the run has 1; change --mesh"):
        Layout(config)
