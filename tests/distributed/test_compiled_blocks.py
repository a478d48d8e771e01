"""Compiled blocks under FSDP2: its hooks run outside of the compiled functions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed.compiled_cases import compiled_step, network, step
from tests.distributed.ranks import run_on_ranks
from tests.rcm.models.backbones import BATCH

pytestmark = [pytest.mark.xdist_group("ranks"), pytest.mark.slow]


def test_a_step_on_two_ranks_equals_one_process(tmp_path: Path) -> None:
    found = run_on_ranks(compiled_step, BATCH, tmp_path)
    expected = step(network(), slice(None))
    for name, x in expected.items():
        is_gradient = name not in ("F", "derivative")
        y = found[0][name] if is_gradient else torch.cat([rank[name] for rank in found])
        # The gradient of a key's bias is zero but for rounding.
        assert (y - x).norm() <= 1e-5 * x.norm() + 1e-9, name
