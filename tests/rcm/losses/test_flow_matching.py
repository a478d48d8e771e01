"""Flow matching is minimal at the exact velocity."""

import torch
from torch import Tensor

from rcm.losses.flow_matching import flow_matching_loss
from rcm.time_sampling import LogNormal
from tests.rcm.analytic_networks import Gaussian


def test_flow_matching_is_minimal_at_the_exact_velocity(
    gaussian: Gaussian, generator: torch.Generator
) -> None:
    z, noise = torch.randn(2, 20_000, 1, generator=generator)
    x0, t = gaussian.mean + gaussian.std * z, LogNormal(mean=0.0, std=1.0)(20_000, generator)

    def loss(scale: float, offset: float) -> float:
        def net(x: Tensor, t: Tensor, condition: object) -> Tensor:
            return scale * gaussian.velocity(x, t) + offset * x

        return flow_matching_loss(net, x0, noise, t, None).value.mean().item()

    least = loss(1.0, 0.0)
    for scale, offset in [(1.04, 0.0), (0.96, 0.0), (1.0, 0.04), (1.0, -0.04)]:
        assert loss(scale, offset) > least + 1e-4
