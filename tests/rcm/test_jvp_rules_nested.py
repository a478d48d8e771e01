"""The JVP rules where a network differentiates inside of itself, and at higher orders."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from rcm.derivatives import exact_jvp, one_pass_jvp
from rcm.norms import layer_norm

Function = Callable[[Tensor], Tensor]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def relative(value: Tensor, expected: Tensor) -> float:
    return ((value - expected).norm() / expected.norm()).item()


def difference(f: Function, x: Tensor, t: Tensor, h: float = 1e-4) -> Tensor:
    """The derivative along t by differences of fourth order."""
    near, far = f(x + h * t) - f(x - h * t), f(x + 2 * h * t) - f(x - 2 * h * t)
    return (8 * near - far) / (12 * h)


# ---- higher orders -----------------------------------------------------------------------------


@pytest.mark.parametrize("enabled", [True, False])
def test_third_derivatives_through_layer_norm(enabled: bool) -> None:
    x, t = drawn(3, 4), drawn(3, 4, seed=1)

    def f(z: Tensor) -> Tensor:
        return functional.layer_norm(z, (4,)).sin()

    def of_order(n: int) -> Function:
        if n == 0:
            return f
        return lambda z: exact_jvp(of_order(n - 1), (z,), (t,))[1]

    with torch.set_grad_enabled(enabled):
        third = of_order(3)(x)
    assert relative(third, difference(of_order(2), x, t)) < 1e-8


def test_the_gradient_of_a_second_derivative_through_layer_norm() -> None:
    x, t, v = drawn(3, 4).requires_grad_(), drawn(3, 4, seed=1), drawn(3, 4, seed=2)

    def second(z: Tensor) -> Tensor:
        def first(u: Tensor) -> Tensor:
            return exact_jvp(lambda w: layer_norm(w, (4,)).sin(), (u,), (t,))[1]

        return exact_jvp(first, (z,), (t,))[1].square().sum()

    (gradient,) = torch.autograd.grad(second(x), x)
    expected = difference(second, x.detach(), v)
    assert relative((gradient * v).sum(), expected) < 1e-8


# ---- a graph inside of the function ------------------------------------------------------------


def inner_gradient(of_both: Callable[[Tensor, Tensor], Tensor], *shape: int) -> Function:
    """z -> the gradient of |of_both(z, w)|² + |w|² in w, at w = 1."""

    def f(z: Tensor) -> Tensor:
        w = torch.ones(shape, dtype=z.dtype, requires_grad=True)
        with torch.enable_grad():
            return torch.autograd.grad(of_both(z, w).square().sum() + w.square().sum(), w)[0]

    return f


WEIGHT = drawn(4, 4, seed=7)
INSIDE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "product": lambda z, w: z * w,
    "quotient": lambda z, w: w / (z * z + 1) / 3.0,
    "sum": lambda z, w: (w + 1.0) * (z - 2.0),
    "addcmul": lambda z, w: torch.addcmul(z, z, w * z),
    "linear": lambda z, w: functional.linear(w * z, WEIGHT).sin() * z,
    "layer_norm": lambda z, w: functional.layer_norm(z * w + z.sin(), (4,)).sin() + z,
    "weight of layer_norm": lambda z, w: functional.layer_norm(z, (4,), w[0]),
    "rms_norm": lambda z, w: functional.rms_norm(z * w + z.sin(), (4,), eps=1e-6).sin() + z,
    "ours": lambda z, w: layer_norm(z * w + z.sin(), (4,)).sin() + z,
}


@pytest.mark.parametrize("name", INSIDE)
@pytest.mark.parametrize("enabled", [True, False])
def test_a_gradient_inside_of_the_function_keeps_its_tangent(name: str, enabled: bool) -> None:
    x, t = drawn(3, 4), drawn(3, 4, seed=1)
    f = inner_gradient(INSIDE[name], 3, 4)
    with torch.set_grad_enabled(enabled):
        value, tangent = exact_jvp(f, (x,), (t,))
    assert relative(value, f(x)) < 1e-12
    assert relative(tangent, difference(f, x, t)) < 1e-8


def test_our_layer_norm_in_a_plain_jvp_keeps_the_tangent_of_an_inner_gradient() -> None:
    x, t = drawn(3, 4), drawn(3, 4, seed=1)
    f = inner_gradient(INSIDE["ours"], 3, 4)
    _, tangent = torch.func.jvp(f, (x,), (t,))
    assert relative(tangent, difference(f, x, t)) < 1e-8


# ---- a jvp inside of the function --------------------------------------------------------------


@pytest.mark.parametrize("layer", ["linear", "layer_norm", "product"])
def test_one_pass_records_a_jvp_inside_of_the_function(layer: str) -> None:
    """The derivative inside belongs to the value, whose gradient is complete."""
    x, v, t = drawn(3, 4), drawn(3, 4, seed=1), drawn(3, 4, seed=2)
    module = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Tanh()).double()
    scale = drawn(4, seed=3).requires_grad_()
    parts: dict[str, Function] = {
        "linear": lambda u: module[0](u).sin(),
        "layer_norm": lambda u: module(u),
        "product": lambda u: (u * scale).sin(),
    }
    parameter = scale if layer == "product" else module[0].weight

    def f(z: Tensor) -> Tensor:
        return torch.func.jvp(parts[layer], (z,), (v,))[1]

    value, _ = one_pass_jvp(f, (x,), (t,))
    (gradient,) = torch.autograd.grad(value.square().sum(), parameter)
    direction = drawn(*parameter.shape, seed=4)

    def loss(step: Tensor) -> Tensor:
        with torch.no_grad():
            parameter.add_(step)
            found = f(x).square().sum()
            parameter.sub_(step)
        return found

    zero = torch.zeros_like(direction)
    assert relative((gradient * direction).sum(), difference(loss, zero, direction)) < 1e-8


# ---- what PyTorch does -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "norm",
    [
        lambda z: functional.batch_norm(z, None, None, None, None, True),
        lambda z: torch.batch_norm(z, None, None, None, None, True, 0.1, 1e-5, False),
        lambda z: functional.instance_norm(z[None]),
        lambda z: torch.instance_norm(z[None], None, None, None, None, True, 0.1, 1e-5, False),
        lambda z: torch.native_layer_norm(z, [4], None, None, 1e-5)[0],
    ],
    ids=["batch_norm", "torch.batch_norm", "instance_norm", "torch.instance_norm", "native"],
)
def test_a_norm_whose_gradient_is_wrong_raises(norm: Function) -> None:
    x, t = drawn(3, 4), drawn(3, 4, seed=1)
    with pytest.raises(NotImplementedError, match="wrong in PyTorch"):
        exact_jvp(norm, (x,), (t,))
    for derivative in (exact_jvp, one_pass_jvp):  # without gradients through the tangent
        with torch.set_grad_enabled(derivative is one_pass_jvp):
            _, tangent = derivative(norm, (x,), (t,))
        assert relative(tangent, difference(norm, x, t)) < 1e-8


def test_complex_operands_and_old_call_forms_are_those_of_pytorch() -> None:
    x, t = drawn(3, 4), drawn(3, 4, seed=1)
    functions: list[Function] = [
        lambda z: (torch.fft.fft(z) * z).abs(),
        lambda z: (z + torch.fft.fft(z)).abs(),
        lambda z: (torch.fft.fft(z) / z).abs(),
    ]
    with pytest.warns(UserWarning, match="addcmul"):
        value, tangent = exact_jvp(lambda z: torch.addcmul(z, 2, z, z), (x,), (t,))
    assert relative(value, x + 2 * x * x) < 1e-15
    assert relative(tangent, t + 4 * x * t) < 1e-15
    for f in functions:
        _, tangent = exact_jvp(f, (x,), (t,))
        assert relative(tangent, difference(f, x, t)) < 1e-8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("derivative", [exact_jvp, one_pass_jvp])
def test_layer_norm_of_half_precision_with_weights_of_float32(
    dtype: torch.dtype, derivative: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    x, t = drawn(3, 64).to(dtype), drawn(3, 64, seed=1).to(dtype)
    weight, bias = drawn(64, seed=2).float(), drawn(64, seed=3).float()

    def norm(z: Tensor) -> Tensor:
        return functional.layer_norm(z, (64,), weight.to(z.dtype), bias.to(z.dtype))

    with torch.set_grad_enabled(derivative is one_pass_jvp):
        _, tangent = derivative(lambda z: functional.layer_norm(z, (64,), weight, bias), (x,), (t,))
    _, expected = exact_jvp(norm, (x.double(),), (t.double(),))
    assert tangent.dtype == dtype
    assert relative(tangent.double(), expected) < 2 * torch.finfo(dtype).eps
