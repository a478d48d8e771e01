"""The DiT in bfloat16: close to float32 where bfloat16 allows, with float32 weights and times."""

import pytest
import torch
from torch import Tensor

from rcm.derivatives import Derivative, central_difference, exact_jvp, one_pass_jvp
from rcm.models.dit import DiT, DiTConfig
from tests.rcm.models.networks import OPTIONS, example, randomised, small_dit

ROUNDING = 2.0**-9  # largest relative error of rounding to bfloat16


def error(value: Tensor, expected: Tensor) -> float:
    return ((value.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.fixture
def networks() -> tuple[DiT, DiT]:
    """The same weights in float64 and in bfloat16."""
    plain, rounded = randomised(), small_dit(precision="bfloat16").float()
    rounded.load_state_dict(plain.state_dict())
    return plain, rounded


def along_ode(net: DiT, derivative: Derivative, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    x, t, labels, end = example()
    direction = torch.randn_like(x)
    primals = (x.to(dtype), t.to(dtype), end.to(dtype))
    tangents = (direction.to(dtype), torch.ones_like(primals[1]), torch.zeros_like(primals[2]))
    return derivative(lambda x, t, end: net(x, t, labels, end=end), primals, tangents)


@pytest.mark.parametrize("derivative", [exact_jvp, one_pass_jvp])
def test_the_jvp_in_bfloat16_is_close_and_a_short_difference_is_not(
    networks: tuple[DiT, DiT], derivative: Derivative
) -> None:
    exact, rounded = networks
    f, df = along_ode(exact, exact_jvp, torch.float64)
    found, tangent = along_ode(rounded, derivative, torch.float32)
    assert found.dtype == tangent.dtype == torch.float32
    for value, expected in ((found, f), (tangent, df)):
        assert 0.1 * ROUNDING < error(value, expected) < 15 * ROUNDING
    difference = along_ode(rounded, central_difference(1e-3), torch.float32)[1]
    assert error(difference, df) > 0.5


@pytest.mark.parametrize("derivative", [exact_jvp, one_pass_jvp])
def test_gradients_in_bfloat16_reach_every_weight_in_float32(
    networks: tuple[DiT, DiT], derivative: Derivative
) -> None:
    exact, rounded = networks
    gradients = []
    for net, dtype in ((exact, torch.float64), (rounded, torch.float32)):
        with torch.no_grad():  # leaves nothing behind for the pass with gradients
            along_ode(net, derivative, dtype)
        f, df = along_ode(net, derivative, dtype)
        (f.square().sum() + df.square().sum()).backward()
        gradients.append({n: p.grad for n, p in net.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[1].items():
        assert gradient.dtype == torch.float32
        assert error(gradient, gradients[0][name]) < 0.2, name


def test_heads_and_samples_keep_the_dtype_of_x() -> None:
    x, t, labels, end = (z if z.dtype == torch.int64 else z.float() for z in example())
    net = small_dit(**OPTIONS["auxiliary_head"], precision="bfloat16").float()
    assert net.heads is not None
    outputs = (net(x, t, labels), *net.heads(x, t, labels, end=end))
    assert {output.dtype for output in outputs} == {torch.float32}
    with pytest.raises(ValueError, match="float32"):
        net(x, t.bfloat16(), labels)


def test_precision_does_not_tell_models_apart() -> None:
    """So that a student in bfloat16 may take a teacher in float32."""
    assert DiTConfig().differences(DiTConfig(precision="bfloat16")) == []
    with pytest.raises(ValueError, match="precision is 'float16'"):
        DiTConfig(precision="float16")  # type: ignore[arg-type]
