"""Gradients that a function under torch.func.jvp takes of itself."""

import torch
from torch import Tensor

from jvp_attn import flash_attn_jvp


def test_a_gradient_inside_of_a_jvp_has_its_value_and_its_tangent() -> None:
    """Of a weight that only the function knows, so that autograd records inside of the jvp."""
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(2, 1, 5, 2, 8, generator=generator, dtype=torch.float64)

    def f(z: Tensor) -> Tensor:
        w = torch.ones_like(x, requires_grad=True)
        out = flash_attn_jvp(z, z * 0.5, z * w)
        return torch.autograd.grad(out.square().sum() + w.square().sum(), w)[0]

    value, tangent = torch.func.jvp(f, (x,), (t,))
    torch.testing.assert_close(value, f(x))
    h = 1e-4
    near, far = f(x + h * t) - f(x - h * t), f(x + 2 * h * t) - f(x - 2 * h * t)
    torch.testing.assert_close(tangent, (8 * near - far) / (12 * h), rtol=1e-7, atol=1e-9)
