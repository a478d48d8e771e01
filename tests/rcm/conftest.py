"""Fixtures of the tests of losses and samplers."""

import pytest
import torch
from torch import Tensor

from tests.rcm.analytic_networks import Gaussian


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def gaussian() -> Gaussian:
    return Gaussian()


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def times() -> Tensor:
    """Times over the whole range including both ends, float64."""
    return torch.tensor([0.0, 0.01, 0.4, 0.8, 1.2, 1.5, torch.pi / 2], dtype=torch.float64)
