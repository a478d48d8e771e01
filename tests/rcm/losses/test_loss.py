"""Losses add and scale like formulas."""

import pytest
import torch

from rcm.losses import Loss, consistency_loss, score_loss
from tests.rcm.analytic_networks import Gaussian, SmoothNetwork


def test_losses_add_like_formulas(gaussian: Gaussian) -> None:
    student = SmoothNetwork(5)
    x0, noise, t = torch.randn(6, 5), torch.randn(6, 5), torch.linspace(0.1, 1.5, 6)
    consistency = consistency_loss(student, x0, noise, t, None, tangent_norm="l2")
    dmd = score_loss(
        student(noise, t), noise, t, None, teacher=gaussian.velocity, fake_score=student
    )
    total = consistency + 0.01 * dmd
    torch.testing.assert_close(total.value, consistency.value + 0.01 * dmd.value)
    assert total.diagnostics.keys() == consistency.diagnostics.keys() | dmd.diagnostics.keys()
    with pytest.raises(ValueError, match="both losses report"):
        consistency + consistency
    with pytest.raises(ValueError, match="must be equal"):
        consistency + Loss(torch.zeros(3), {})
