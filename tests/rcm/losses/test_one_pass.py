"""One pass gives the values and gradients of two, with one evaluation of the student."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jvp_attn import checkpoint_jvp, checkpoint_primal
from rcm.derivatives import Derivative, central_difference, exact_jvp, one_pass_jvp
from rcm.losses import (
    Loss,
    consistency,
    consistency_loss,
    lagrangian_flow_map_loss,
    mean_flow_loss,
    terminal_velocity_loss,
)
from rcm.models.dit import DiT
from tests.rcm.analytic_networks import SmoothNetwork
from tests.rcm.models.networks import randomised

LossOf = Callable[..., Loss]


def along_data(student: Any, x0: Tensor, noise: Tensor, t: Tensor, c: Any, **options: Any) -> Loss:
    return consistency_loss(student, x0, noise, t, c, **options)


def of_flow_map(student: Any, x0: Tensor, noise: Tensor, t: Tensor, c: Any, **options: Any) -> Loss:
    return consistency_loss(student, x0, noise, t, c, end=t / 3, form="rcm", warmup=0.7, **options)


def mean_flow(student: Any, x0: Tensor, noise: Tensor, t: Tensor, c: Any, **options: Any) -> Loss:
    return mean_flow_loss(student, x0, noise, t, t / 3, c, **options)


def improved(student: Any, x0: Tensor, noise: Tensor, t: Tensor, c: Any, **options: Any) -> Loss:
    return mean_flow_loss(student, x0, noise, t, t / 3, c, improved=True, **options)


def sine(x: Tensor, t: Tensor, condition: Any) -> Tensor:
    return x.sin()


def lagrangian(student: Any, x0: Tensor, noise: Tensor, t: Tensor, c: Any, **options: Any) -> Loss:
    options = {"teacher": sine, **options}
    return lagrangian_flow_map_loss(student, x0, noise, t, t / 3, c, **options)


LOSSES = pytest.mark.parametrize(
    "loss_of", [along_data, of_flow_map, mean_flow, improved, lagrangian]
)


class Counted(nn.Module):
    """A network that counts its evaluations, and which of them have gradients."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.calls: list[bool] = []

    def forward(self, *args: Any, **options: Any) -> Tensor:
        self.calls.append(torch.is_grad_enabled())
        return self.net(*args, **options)


def results(student: nn.Module, loss_of: LossOf, derivative: Derivative, *data: Any) -> Any:
    """Value, diagnostics and gradients of all parameters."""
    student.zero_grad()
    torch.manual_seed(1)
    loss = loss_of(student, *data, derivative=derivative)
    loss.value.sum().backward()
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in student.named_parameters()
    }
    return loss.value.detach(), loss.diagnostics, gradients, torch.get_rng_state()


def vectors(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, None]:
    torch.manual_seed(0)
    x0, noise = torch.randn(2, 6, 5, dtype=dtype)
    return x0, noise, torch.linspace(0.1, 1.5, 6, dtype=torch.float64), None


@LOSSES
def test_one_pass_agrees_with_two(loss_of: LossOf) -> None:
    student = SmoothNetwork(5, dropout=0.3).double()  # the random state counts the masks drawn
    one, two = (results(student, loss_of, d, *vectors()) for d in (one_pass_jvp, exact_jvp))
    torch.testing.assert_close(one, two, atol=1e-12, rtol=1e-12)


@LOSSES
@pytest.mark.parametrize("shared", [True, False])
def test_no_gradient_passes_through_the_teacher(loss_of: LossOf, shared: bool) -> None:
    """Neither into its parameters, the student's or its own, nor through it into the data."""
    student = SmoothNetwork(5).double()
    teacher = student if shared else SmoothNetwork(5).double()
    found = []
    for derivative in (one_pass_jvp, exact_jvp):
        x0, noise, t, _ = vectors()
        x0.requires_grad_()
        of_student = partial(loss_of, teacher=lambda x, t, c: teacher(x, t, c, end=t))
        value, diagnostics, gradients, _ = results(
            student, of_student, derivative, x0, noise, t, None
        )
        assert not any(x.requires_grad for x in diagnostics.values())
        found.append((value, diagnostics, gradients, x0.grad))
    torch.testing.assert_close(*found, atol=1e-12, rtol=1e-12)
    assert shared or all(p.grad is None for p in teacher.parameters())


@LOSSES
@pytest.mark.parametrize("call", [None, checkpoint_primal, checkpoint_jvp])
@pytest.mark.parametrize("auxiliary_head", [False, True])
def test_one_pass_of_a_dit_agrees_with_two(
    loss_of: LossOf, call: Callable[..., Tensor] | None, auxiliary_head: bool
) -> None:
    """With and without blocks that keep only their inputs."""
    torch.manual_seed(0)
    data = (
        *torch.randn(2, 3, 1, 8, 8, dtype=torch.float64),
        torch.tensor([0.2, 0.8, 1.4]).double(),
    )
    student = randomised(auxiliary_head=auxiliary_head)
    two = results(student, loss_of, exact_jvp, *data, torch.tensor([1, 2, 3]))
    if call is not None:
        for block in student.blocks:
            block.forward = partial(call, block.forward)
    one = results(student, loss_of, one_pass_jvp, *data, torch.tensor([1, 2, 3]))
    torch.testing.assert_close(one, two, atol=1e-12, rtol=1e-11)


@LOSSES
@pytest.mark.parametrize(("derivative", "evaluations"), [(one_pass_jvp, 1), (exact_jvp, 2)])
def test_one_pass_evaluates_the_student_once(
    loss_of: LossOf, derivative: Derivative, evaluations: int
) -> None:
    student = Counted(SmoothNetwork(5).double())
    results(student, loss_of, derivative, *vectors())
    own_velocity = loss_of is improved
    assert len(student.calls) == evaluations + own_velocity
    assert sum(student.calls) == 1


def test_the_gradient_is_right_through_torchs_layer_norm() -> None:
    """The gradient through the tangent would not be; one pass does not replace the norm."""

    class WithNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.norm = SmoothNetwork(5), nn.LayerNorm(5)

        def forward(self, x: Tensor, t: Tensor, condition: Any) -> Tensor:
            return self.norm(self.net(x, t) + x)

    student = WithNorm().double()
    one, two = (results(student, along_data, d, *vectors()) for d in (one_pass_jvp, exact_jvp))
    torch.testing.assert_close(one, two, atol=1e-12, rtol=1e-12)


def test_a_student_that_is_the_teacher_has_a_zero_gradient_at_the_start_of_warmup() -> None:
    """F of the JVP equals F of the teacher to the last bit: Adam would magnify a difference."""
    student = randomised().float()
    x0, noise = torch.randn(2, 3, 1, 8, 8)
    t, labels = torch.tensor([0.2, 0.8, 1.4]), torch.tensor([1, 2, 3])
    consistency_loss(
        student, x0, noise, t, labels, teacher=student, warmup=0, derivative=one_pass_jvp
    ).value.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in student.parameters())


@pytest.mark.parametrize("call", [None, checkpoint_primal])
def test_the_residual_is_exactly_the_normalised_tangent_in_bfloat16(
    call: Callable[..., Tensor] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tangents = []

    def recorded(*args: Any, **options: Any) -> Tensor:
        tangents.append(normalize(*args, **options))
        return tangents[-1]

    normalize = consistency.normalize_tangent
    monkeypatch.setattr(consistency, "normalize_tangent", recorded)
    student = DiT(dim=16, depth=2, heads=2).bfloat16()
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.1 * torch.randn_like(p))
    if call is not None:
        for block in student.blocks:
            block.forward = partial(call, block.forward)
    x0, noise = torch.randn(2, 3, 1, 8, 8).bfloat16()
    t, labels = torch.tensor([0.2, 0.8, 1.4]), torch.tensor([1, 2, 3])
    loss = consistency_loss(student, x0, noise, t, labels, derivative=one_pass_jvp)
    assert torch.equal(loss.value.detach(), tangents[0].flatten(1).square().mean(1))
    loss.value.sum().backward()


@LOSSES
def test_a_sample_with_nan_data_is_masked_and_counted(loss_of: LossOf) -> None:
    student, (x0, noise, t, _) = SmoothNetwork(5).double(), vectors()
    others = torch.tensor([0, 1, 3, 4, 5])
    expected = results(student, loss_of, one_pass_jvp, x0[others], noise[others], t[others], None)
    x0[2, 3] = float("nan")
    found = results(student, loss_of, one_pass_jvp, x0, noise, t, None)
    assert found[1]["nonfinite"].tolist() == [0, 0, 1, 0, 0, 0]
    assert found[0][2] == 0
    torch.testing.assert_close(found[2], expected[2])


@LOSSES
def test_a_student_that_overflows_has_a_nonfinite_gradient(loss_of: LossOf) -> None:
    net = SmoothNetwork(5).double()

    def student(x: Tensor, t: Tensor, condition: Any, end: Tensor | None = None) -> Tensor:
        f = net(x, t, condition, end)
        return torch.where(torch.arange(6)[:, None] == 2, (1e300 * f).exp(), f)

    loss = loss_of(student, *vectors(), derivative=one_pass_jvp)
    assert loss.diagnostics["nonfinite"].tolist() == [0, 0, 1, 0, 0, 0]
    assert loss.value.isfinite().all()
    loss.value.sum().backward()
    assert not all(p.grad.isfinite().all() for p in net.parameters())


def test_without_gradients_the_values_are_the_same() -> None:
    student = SmoothNetwork(5).double()
    with torch.no_grad():
        losses = [along_data(student, *vectors(), derivative=d) for d in (one_pass_jvp, exact_jvp)]
    assert not losses[0].value.requires_grad
    torch.testing.assert_close(losses[0].value, losses[1].value)


def test_losses_with_gradients_through_the_derivative_refuse_one_pass() -> None:
    x0, noise, t, _ = vectors()
    student = SmoothNetwork(5).double()
    with pytest.raises(ValueError, match="use exact_jvp"):
        lagrangian(student, x0, noise, t, None, stopped=False, derivative=one_pass_jvp)
    with pytest.raises(ValueError, match="use exact_jvp"):
        terminal_velocity_loss(student, x0, noise, t, t / 3, None, derivative=one_pass_jvp)


def test_a_central_difference_takes_two_passes() -> None:
    student = Counted(SmoothNetwork(5).double())
    results(student, along_data, central_difference(1e-3), *vectors())
    assert student.calls == [False, False, False, True]
