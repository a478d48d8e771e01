"""The one-pass step of unmodified networks of diffusers: results of two passes, at less cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from live_bytes import PeakBytes
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from jvp_attn import checkpoint_primal, replace_sdpa
from rcm.derivatives import Derivative, exact_jvp, one_pass_jvp
from rcm.losses import Loss, consistency, consistency_loss
from rcm.network_conversions import from_rectified_flow
from tests.models.networks import Network, cosmos, sd3, wan

of_diffusers = pytest.mark.parametrize("build", [wan, cosmos, sd3])


class Student(nn.Module):
    """A network of diffusers as a TrigFlow network."""

    def __init__(self, network: Network, dtype: torch.dtype, checkpoint: Any = None) -> None:
        super().__init__()
        self.model = network.to(dtype)
        self.dtype = dtype
        self.x0 = network.inputs[0].float()
        if checkpoint is not None:
            network.module.enable_gradient_checkpointing(checkpoint)

    def forward(self, x: Tensor, t: Tensor, condition: Any) -> Tensor:
        def raw(x: Tensor, t: Tensor, condition: Any) -> Tensor:
            return self.model(x.to(self.dtype), t.float()).float()

        f: Tensor = from_rectified_flow(raw, time_scale=1000.0)(x, t, condition)
        return f

    def step(self, derivative: Derivative) -> Loss:
        """A consistency loss, after its backward pass."""
        torch.manual_seed(0)
        noise, t = torch.randn_like(self.x0), torch.tensor([0.4, 1.3]).double()
        with replace_sdpa():
            loss = consistency_loss(self, self.x0, noise, t, None, derivative=derivative)
            loss.value.sum().backward()
        return loss


def gradients(student: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@of_diffusers
def test_one_pass_agrees_with_two(build: Callable[[], Network]) -> None:
    one = Student(build(), torch.float32, checkpoint_primal)
    two = Student(build(), torch.float32)
    losses = one.step(one_pass_jvp), two.step(exact_jvp)
    for name, expected in losses[1].diagnostics.items():
        torch.testing.assert_close(losses[0].diagnostics[name], expected, rtol=1e-6, atol=0)
    found, expected_gradients = gradients(one), gradients(two)
    assert found.keys() == expected_gradients.keys()
    largest = max(float(g.norm()) for g in expected_gradients.values())
    for name, expected in expected_gradients.items():
        # Some are zero but for rounding, such as that of a key's bias.
        error = float((found[name] - expected).norm())
        assert error <= 1e-6 * float(expected.norm()) + 1e-8 * largest, name


@of_diffusers
def test_the_derivative_is_that_of_two_passes(build: Callable[[], Network]) -> None:
    def derivative_of(student: Student, derivative: Derivative) -> Tensor:
        x, t = student.x0, torch.tensor([0.4, 1.3])
        with replace_sdpa(), torch.set_grad_enabled(derivative is one_pass_jvp):
            arguments = (x, t), (x.cos(), torch.ones_like(t))
            return derivative(lambda x, t: student(x, t, None), *arguments)[1]

    one = derivative_of(Student(build(), torch.float32, checkpoint_primal), one_pass_jvp)
    two = derivative_of(Student(build(), torch.float32), exact_jvp)
    assert not one.requires_grad
    assert relative_error(one, two) <= 2 * torch.finfo(torch.float32).eps


@of_diffusers
def test_the_residual_is_exactly_the_normalised_tangent_in_bfloat16(
    build: Callable[[], Network], monkeypatch: pytest.MonkeyPatch
) -> None:
    tangents = []

    def recorded(*args: Any, **options: Any) -> Tensor:
        tangents.append(normalize(*args, **options))
        return tangents[-1]

    normalize = consistency.normalize_tangent
    monkeypatch.setattr(consistency, "normalize_tangent", recorded)
    loss = Student(build(), torch.bfloat16, checkpoint_primal).step(one_pass_jvp)
    assert torch.equal(loss.value.detach(), tangents[0].flatten(1).square().mean(1))


def test_one_pass_saves_a_forward_pass_at_the_memory_of_checkpoints() -> None:
    """For Wan with 256 tokens; attention is left out of the FLOPs."""

    def costs(derivative: Derivative, *checkpoint: Any) -> tuple[int, int]:
        student = Student(wan(size=32), torch.float32)
        student.model.module.enable_gradient_checkpointing(*checkpoint)
        student.step(derivative)  # caches
        with FlopCounterMode(display=False) as flops:
            student.step(derivative)
        with PeakBytes(student.parameters()) as memory:
            student.step(derivative)
        return flops.get_total_flops(), memory.peak

    student = Student(wan(size=32), torch.float32)
    with torch.no_grad(), replace_sdpa(), FlopCounterMode(display=False) as forward:
        student(student.x0, torch.ones(2), None)
    two_passes, one_pass = costs(exact_jvp), costs(one_pass_jvp, checkpoint_primal)
    saved = two_passes[0] - one_pass[0]
    assert 0.9 < saved / forward.get_total_flops() < 1.1
    assert one_pass[1] <= 1.10 * two_passes[1]
