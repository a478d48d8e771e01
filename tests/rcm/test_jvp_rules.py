"""The rules of rcm.jvp_rules against PyTorch's own derivatives, and where PyTorch's are used."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from jvp_attn import checkpoint_jvp, checkpoint_primal
from rcm.derivatives import exact_jvp, one_pass_jvp
from rcm.jvp_rules import JvpRules
from rcm.norms import layer_norm

BATCH, TOKENS, DIM = 2, 3, 4


class Network(nn.Module):
    """Every rule, in float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM, bias=False)
        self.norms = nn.ModuleList([nn.LayerNorm(DIM), nn.RMSNorm(DIM, eps=1e-3)])
        self.constant = nn.Parameter(torch.randn(TOKENS, DIM))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(1 + self.constant - x)
        h = torch.addcmul(h, self.norms[0](h * self.constant), nn.functional.silu(2 * h) / 3)
        return self.last(self.norms[1](h - 0.5 * self.constant)) + h


def duals(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    x, tangent = torch.randn(2, BATCH, TOKENS, DIM, dtype=torch.float64)
    return x.to(dtype), tangent.to(dtype)


def own(function: Callable[..., Any], *duals: Tensor) -> Any:
    """PyTorch's JVP, whose gradient is right for what has no layer_norm."""
    n = len(duals) // 2
    return torch.func.jvp(function, duals[:n], duals[n:])


def ours(function: Callable[..., Any], *duals: Tensor) -> Any:
    with JvpRules():
        return own(function, *duals)


def gradients(network: nn.Module, outputs: Any, *others: Tensor) -> Any:
    loss = sum(y.square().sum() for y in outputs)
    tensors = [p for p in network.parameters() if p.requires_grad]
    return torch.autograd.grad(loss, (*tensors, *others), allow_unused=True)


def equal(actual: Any, expected: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


class WithoutLayerNorm(Network):
    def __init__(self) -> None:
        super().__init__()
        self.norms[0] = nn.RMSNorm(DIM, eps=1e-3).double()


def test_value_and_tangent_are_those_of_pytorch() -> None:
    with torch.no_grad():
        equal(ours(Network(), *duals()), own(Network(), *duals()))


def test_gradients_through_both_are_those_of_pytorch() -> None:
    network, (x, tangent) = WithoutLayerNorm(), duals()
    x.requires_grad_()
    tangent.requires_grad_()
    found, expected = (gradients(network, f(network, x, tangent), x, tangent) for f in (ours, own))
    equal(found, expected)


def test_second_gradients_through_both_are_right() -> None:
    network, (x, tangent) = Network(), duals()

    def gradient(x: Tensor, tangent: Tensor) -> tuple[Tensor, ...]:
        loss = sum(y.square().sum() for y in exact_jvp(network, (x,), (tangent,)))
        return torch.autograd.grad(loss, (x, tangent), create_graph=True)

    inputs = (x.requires_grad_(), tangent.requires_grad_())
    assert torch.autograd.gradcheck(gradient, inputs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("transform", ["jvp", "vmap", "grad", "inner vmap", "inner grad"])
def test_nested_transforms(transform: str) -> None:
    network, (x, tangent) = WithoutLayerNorm().requires_grad_(False), duals()

    def results(jvp: Callable[..., Any]) -> Any:
        along = partial(jvp, network)
        if transform == "jvp":
            return torch.func.jvp(along, (x, tangent), (tangent, x))
        if transform == "vmap":
            return torch.func.vmap(along)(x, tangent)
        if transform == "grad":
            return torch.func.grad(lambda x: along(x, tangent)[1].square().sum())(x)
        if transform == "inner vmap":
            return jvp(torch.func.vmap(network), x, tangent)
        return jvp(torch.func.grad(lambda x: network(x).square().sum()), x, tangent)

    equal(results(ours), results(own))


@pytest.mark.parametrize("transform", ["jvp", "vmap", "inner vmap"])
def test_layer_norm_in_nested_transforms_without_grad(transform: str) -> None:
    """Where the tangent is the result of layer_norm's VJP."""
    norm, (x, tangent) = nn.LayerNorm(DIM).double(), duals()

    def results(jvp: Callable[..., Any], norm: Callable[..., Tensor]) -> Any:
        along = partial(jvp, norm)
        if transform == "jvp":
            return torch.func.jvp(along, (x, tangent), (tangent, x))
        if transform == "vmap":
            return torch.func.vmap(along)(x, tangent)
        return jvp(torch.func.vmap(norm), x, tangent)

    def formula(x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt()

    with torch.no_grad():
        equal(results(ours, norm), results(own, formula))


def test_gradient_through_layer_norm_inside_of_vmap() -> None:
    norm, (x, tangent) = nn.LayerNorm(DIM).double().requires_grad_(False), duals()

    def derivative(x: Tensor, tangent: Tensor) -> Tensor:
        return exact_jvp(torch.func.vmap(norm), (x,), (tangent,))[1]

    assert torch.autograd.gradcheck(derivative, (x.requires_grad_(), tangent.requires_grad_()))


def test_parameters_with_tangents_are_left_to_pytorch() -> None:
    """A JVP with respect to parameters, alone and together with the input."""
    network, (x, tangent) = Network(), duals()
    parameters = {name: p.detach() for name, p in network.named_parameters()}
    directions = tree_map(torch.randn_like, parameters)

    def of_all(parameters: Any, x: Tensor) -> Tensor:
        return torch.func.functional_call(network, parameters, (x,))

    def results(mode: Any) -> Any:
        with torch.no_grad(), mode:
            alone = torch.func.jvp(lambda p: of_all(p, x), (parameters,), (directions,))
            both = torch.func.jvp(of_all, (parameters, x), (directions, tangent))
        return alone, both

    equal(results(JvpRules()), results(torch.no_grad()))


def half(network: nn.Module) -> nn.Module:
    return network.requires_grad_(False)


def tied(network: nn.Module) -> nn.Module:
    network.last.weight = network.first.weight
    return network


class Scaled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def parametrized(network: nn.Module) -> nn.Module:
    parametrize.register_parametrization(network.last, "weight", Scaled())
    return network


class LowRank(nn.Linear):
    """LoRA."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(DIM, DIM, dtype=torch.float64)
        self.base, self.down = base, nn.Parameter(torch.ones(DIM, 1, dtype=torch.float64))

    def forward(self, input: Tensor) -> Tensor:
        return self.base(input) + super().forward(input) + (input @ self.down) @ self.down.T


def low_rank(network: nn.Module) -> nn.Module:
    network.first = LowRank(network.first)
    return network


@pytest.mark.parametrize("change", [half, tied, parametrized, low_rank])
def test_weights_that_are_frozen_shared_or_computed(change: Callable[..., nn.Module]) -> None:
    network, (x, tangent) = change(WithoutLayerNorm()), duals()
    x.requires_grad_()
    found, expected = (gradients(network, f(network, x, tangent), x) for f in (ours, own))
    equal(found, expected)


class Subclass(Tensor):
    """As DTensor and quantised weights are."""


LINEAR = nn.Linear(DIM, 5).double().requires_grad_(False)
WEIGHT, BIAS = LINEAR.weight, LINEAR.bias
FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "no bias": lambda x: nn.functional.linear(x, WEIGHT),
    "bias None": lambda x: nn.functional.linear(x, WEIGHT, None),
    "by name": lambda x: nn.functional.linear(input=x, weight=WEIGHT, bias=BIAS),
    "one row": lambda x: nn.functional.linear(x[0, 0], WEIGHT, BIAS),
    "vector of weights": lambda x: nn.functional.linear(x, WEIGHT[0]),
    "transposed": lambda x: nn.functional.linear(x.mT, torch.ones(2, TOKENS).double()),
    "weight moves": lambda x: nn.functional.linear(torch.ones(DIM).double(), x[0]),
    "bias moves": lambda x: nn.functional.linear(x, torch.ones(DIM, DIM).double(), x[0, 0]),
    "alpha": lambda x: torch.add(x, torch.ones(DIM).double(), alpha=3) - x.sub(1, alpha=2),
    "broadcast": lambda x: torch.ones(5, 1, 1, 1).double() * x[:, :1] + torch.ones(3, 1).double(),
    "reflected": lambda x: 1 - x + (2 / (3 + x)) - (4.0 - x),
    "reciprocals": lambda x: torch.ones(DIM).double() / (3 + x) + torch.ones(DIM).double() - x,
    "subclass that moves": lambda x: (x + x.as_subclass(Subclass)).as_subclass(Tensor),
    "sums of both": lambda x: x + x.mT.mT - x * x / (2 + x * x),
    "wider constant": lambda x: x.float() + torch.ones(DIM).double(),
    "rounding mode": lambda x: torch.div(x, 2, rounding_mode=None),
    "addcmul with value": lambda x: torch.addcmul(x, x, x, value=2),
    "addcmul of a constant": lambda x: torch.addcmul(torch.ones(DIM).double(), x, x),
    "layer_norm over two": lambda x: nn.functional.layer_norm(x, [TOKENS, DIM]),
    "rms_norm by default": lambda x: nn.functional.rms_norm(x, (DIM,)),
    "rms_norm over two": lambda x: nn.functional.rms_norm(x, (TOKENS, DIM), eps=1e-2),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_calls(form: str) -> None:
    with torch.no_grad():
        tolerance = 1e-6 if form == "wider constant" else 1e-12
        equal(ours(FORMS[form], *duals()), own(FORMS[form], *duals()), tolerance)


def test_out_is_rejected_as_by_pytorch() -> None:
    for jvp in (ours, own):
        with pytest.raises(RuntimeError, match="out="):
            jvp(lambda x: torch.add(x, 1, out=torch.empty_like(x)), *duals())


@pytest.mark.parametrize(
    "change",
    [
        lambda x: (x + 1, x.mul_(2)),
        lambda x: (x - torch.zeros(5, 1, 1, 1).double(), x.mul_(2)),
        lambda x: ((x[:, :1] + torch.zeros(TOKENS, 1).double()).mul_(2), x),
        lambda x: ((1 + x).mul_(3), x),
        lambda x: ((0 - (x + 0)).mul_(3), x),
    ],
)
def test_sums_with_constants_are_new_memory(change: Callable[[Tensor], Any]) -> None:
    """A change in place of the one must not change the tangent of the other."""
    results = [jvp(lambda x: change(1.0 * x), *duals()) for jvp in (ours, own)]
    equal(*results)


@pytest.mark.parametrize("call", [checkpoint_jvp, checkpoint_primal])
@pytest.mark.parametrize("derivative", [exact_jvp, one_pass_jvp])
def test_checkpoints(call: Callable[..., Any], derivative: Callable[..., Any]) -> None:
    """Whose second call comes after the JVP; the gradient of checkpoint_primal is of the value."""
    network, (x, tangent) = Network(), duals()
    only_value = call is checkpoint_primal or derivative is one_pass_jvp

    def results(function: Callable[[Tensor], Tensor]) -> Any:
        network.zero_grad()
        value, moved = derivative(function, (x,), (tangent,))
        (value.square().sum() + (0 if only_value else moved.square().sum())).backward()
        return value, moved, [p.grad.clone() for p in network.parameters()]

    equal(results(partial(call, network)), results(network))


@pytest.mark.parametrize("grad", [False, True])
def test_autocast_has_the_dtypes_of_pytorch(grad: bool) -> None:
    network, pair = Network().float(), duals(torch.float32)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        found, expected = ours(network, *pair), own(network, *pair)
    exact = own(copy.deepcopy(network).double(), *(x.double() for x in pair))
    for y, z, e in zip(found, expected, exact, strict=True):
        assert y.dtype == z.dtype
        assert (y - e).abs().max() <= 1.5 * (z - e).abs().max() + 1e-3 * e.abs().max()


def test_dropout_draws_the_same_masks() -> None:
    network = nn.Sequential(nn.Linear(DIM, DIM), nn.Dropout(0.5), nn.Linear(DIM, DIM)).double()
    results = []
    for jvp in (ours, own):
        torch.manual_seed(0)
        results.append(jvp(network, *duals()))
    equal(*results)


def test_subclasses_are_left_to_pytorch() -> None:
    weight = torch.randn(DIM, DIM, dtype=torch.float64).as_subclass(Subclass)
    with FlopCounterMode(display=False) as flops:
        found = ours(lambda x: nn.functional.linear(x, weight), *duals())
    assert flops.get_total_flops() == 3 * 2 * BATCH * TOKENS * DIM**2
    equal(tuple(found), tuple(own(lambda x: nn.functional.linear(x, weight), *duals())))


@pytest.mark.parametrize(("derivative", "products"), [(exact_jvp, 2), (one_pass_jvp, 2), (own, 3)])
def test_a_linear_layer_takes_two_matrix_products(
    derivative: Callable[..., Any], products: int
) -> None:
    linear, (x, tangent) = nn.Linear(DIM, DIM).double(), duals()
    arguments = (x, tangent) if derivative is own else ((x,), (tangent,))
    with FlopCounterMode(display=False) as flops:
        derivative(linear, *arguments)
    assert flops.get_total_flops() == products * 2 * BATCH * TOKENS * DIM**2


def test_one_pass_records_no_graph_of_a_tangent() -> None:
    linear, (x, tangent) = nn.Linear(DIM, DIM).double(), duals()
    with JvpRules(detached=True):
        value, derivative = own(linear, x, tangent)
    assert value.requires_grad
    assert not derivative.requires_grad


@pytest.mark.parametrize("jvp", [False, True])
def test_layer_norm_is_compiled_without_graph_breaks(jvp: bool) -> None:
    x, tangent = duals()

    def function(x: Tensor) -> Any:
        along = partial(layer_norm, normalized_shape=(DIM,))
        return own(along, x, tangent) if jvp else along(x)

    compiled = torch.compile(function, backend="eager", fullgraph=True)
    equal(compiled(x.requires_grad_()), function(x))
