"""The gradient through the exact JVP of normalisations, which PyTorch's own JVP gets wrong."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jvp_attn import checkpoint_jvp
from rcm.derivatives import central_difference, exact_jvp

CASE = (3, 4, 8)  # batch, channels, features


def norms() -> list[nn.Module]:
    return [
        nn.LayerNorm(8),
        nn.LayerNorm((4, 8), eps=0.3),
        nn.LayerNorm(8, bias=False),
        nn.LayerNorm(8, elementwise_affine=False),
        nn.RMSNorm(8),
        nn.GroupNorm(2, 4),
        nn.BatchNorm1d(4).eval(),
        nn.InstanceNorm1d(4, track_running_stats=True).eval(),
    ]


def randomised(norm: nn.Module) -> nn.Module:
    for parameter in norm.double().parameters():
        nn.init.normal_(parameter)
    return norm


@pytest.mark.parametrize("norm", norms(), ids=str)
def test_gradient_through_the_jvp_is_the_finite_difference(norm: nn.Module) -> None:
    """For the input, its tangent and the weights together: all depend on one number."""
    norm = randomised(copy.deepcopy(norm))
    x, tangent, weight, move = torch.randn(4, *CASE, dtype=torch.float64)
    start = {name: p.detach().clone() for name, p in norm.named_parameters()}

    def loss(s: Tensor) -> Tensor:
        moved = {name: p * torch.cos(s) for name, p in start.items()}
        _, derivative = exact_jvp(
            lambda x: torch.func.functional_call(norm, moved, (x,)),
            (x + s * move,),
            (tangent * torch.exp(s),),
        )
        return (derivative * weight).sum()

    s = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(s), s)
    with torch.no_grad():
        quotient = (loss(s + 1e-5) - loss(s - 1e-5)) / 2e-5
    torch.testing.assert_close(gradient, quotient, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("norm", norms()[:4], ids=str)
def test_the_gradient_is_the_same_with_checkpoints(norm: nn.Module) -> None:
    """Whose second call comes in the backward pass, outside of exact_jvp."""
    norm = randomised(copy.deepcopy(norm))
    x, tangent = torch.randn(2, *CASE, dtype=torch.float64, requires_grad=True)

    def results(call: Callable[..., Tensor]) -> Any:
        outputs = exact_jvp(lambda x: call(norm, call(norm, x)), (x,), (tangent,))
        loss = sum(y.square().sum() for y in outputs)
        return outputs, torch.autograd.grad(loss, (x, tangent, *norm.parameters()))

    expected = results(lambda norm, x: norm(x))
    torch.testing.assert_close(results(checkpoint_jvp), expected)


@pytest.mark.parametrize("function", [nn.functional.layer_norm, torch.layer_norm])
def test_layer_norm_takes_its_input_by_name(function: Callable[..., Tensor]) -> None:
    x, tangent = torch.randn(2, *CASE)
    by_name = exact_jvp(lambda x: function(input=x, normalized_shape=(8,)), (x,), (tangent,))
    torch.testing.assert_close(by_name, exact_jvp(lambda x: function(x, (8,)), (x,), (tangent,)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", norms()[:4], ids=str)
@pytest.mark.parametrize("grad", [True, False])
def test_value_and_jvp_are_rounded_once_to_half_precision(
    norm: nn.Module, dtype: torch.dtype, grad: bool
) -> None:
    norm = randomised(copy.deepcopy(norm)).to(dtype)
    x, tangent = torch.randn(2, *CASE).to(dtype)
    with torch.set_grad_enabled(grad):
        actual = exact_jvp(norm, (x,), (tangent,))
    with torch.no_grad():
        exact = exact_jvp(norm.double(), (x.double(),), (tangent.double(),))
    for a, e in zip(actual, exact, strict=True):
        assert a.dtype == dtype
        assert (a - e).abs().max() <= torch.finfo(dtype).eps * e.abs().max()


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm1d(4, track_running_stats=False), nn.InstanceNorm1d(4)], ids=str
)
def test_norms_of_batch_statistics_raise_only_with_gradients(norm: nn.Module) -> None:
    x, tangent = torch.randn(2, *CASE)
    with pytest.raises(NotImplementedError, match="is wrong in PyTorch: use central_difference"):
        exact_jvp(norm, (x,), (tangent,))
    central_difference(1e-3)(norm, (x,), (tangent,))
    with torch.no_grad():
        exact_jvp(norm, (x,), (tangent,))
