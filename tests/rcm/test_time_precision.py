"""Networks that round their time below float32 are refused."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rcm.guidance import guided
from rcm.models.dit import DiT
from rcm.network_conversions import from_edm, from_rectified_flow, from_vp, to_rectified_flow
from rcm.time_conversions import VPSchedule
from rcm.time_precision import guard_time, require_unrounded_time
from rcm.trigflow import Network
from tests.rcm.analytic_networks import SmoothNetwork

LOW_PRECISION = (torch.bfloat16, torch.float16)
low_precision = pytest.mark.parametrize("dtype", LOW_PRECISION)


def check(net: Network, dtype: torch.dtype = torch.float32, **second_time: Tensor) -> None:
    x, t = torch.randn(3, 4, dtype=dtype), torch.tensor([0.3, 0.8, 1.4])
    require_unrounded_time(net, x, t, None, **second_time)


def rounding_wrapper(net: Network, dtype: torch.dtype) -> Network:
    """A rectified-flow network that receives 1000 u rounded to dtype, as in many pipelines."""

    def wrapped(x: Tensor, t: Tensor, condition: object, end: Tensor | None = None) -> Tensor:
        return net(x, t.to(dtype).float(), condition)

    return from_rectified_flow(wrapped, time_scale=1000)


@low_precision
def test_a_wrapper_that_rounds_the_timestep_is_refused(dtype: torch.dtype) -> None:
    """Its output differs for any two times, because the conversion itself depends on t."""
    net = rounding_wrapper(SmoothNetwork(4), dtype)
    with pytest.raises(
        ValueError, match=rf"rounds its time to {dtype} in .*{__name__[-10:]}.*line"
    ):
        check(net)


def test_the_same_wrapper_in_float32_is_accepted() -> None:
    check(rounding_wrapper(SmoothNetwork(4), torch.float32))


ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "cast": lambda t: t.bfloat16(),
    "cast of a function": lambda t: (1000 * torch.sin(t) / 2 + 1).half(),
    "cast of a reshaped time": lambda t: t[:, None, None].expand(-1, 1, 9).bfloat16()[:, 0, 0],
    "cast back": lambda t: t.bfloat16().double(),
    "cast by type_as": lambda t: t.type_as(torch.zeros(1, dtype=torch.float16)),
    "cast by a scalar tensor": lambda t: (1000 * t).to(torch.bfloat16) * torch.tensor(2.0),
}


@pytest.mark.parametrize("rounding", ROUNDINGS.values(), ids=ROUNDINGS)
def test_every_cast_of_the_time_is_found(rounding: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match=r"rounds its time to torch.b?float16"):
        check(lambda x, t, condition: x * rounding(t).float()[:, None])


def test_autocast_of_a_layer_that_receives_the_time_is_found() -> None:
    layer = nn.Linear(1, 4)

    def net(x: Tensor, t: Tensor, condition: object) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return x + layer(t[:, None])

    with pytest.raises(ValueError, match=r"rounds its time to torch.bfloat16"):
        check(net)


def test_a_compiled_network_is_followed_too() -> None:
    net = torch.compile(lambda x, t, condition: x * t.bfloat16()[:, None], backend="eager")
    with pytest.raises(ValueError, match=r"rounds its time to torch.bfloat16"):
        check(net)


@pytest.mark.parametrize("integer_timesteps", [False, True])
def test_a_rounded_timestep_of_ddpm_is_found(integer_timesteps: bool) -> None:
    """The nearest bfloat16 of 999 is 1000."""
    for dtype in (torch.bfloat16, torch.float32):

        def net(x: Tensor, t: Tensor, condition: object, dtype: torch.dtype = dtype) -> Tensor:
            return x * t.to(dtype)[:, None]

        ddpm = from_vp(net, VPSchedule.linear(), integer_timesteps=integer_timesteps)
        if dtype == torch.float32:
            check(ddpm)
        else:
            with pytest.raises(ValueError, match="rounds its time"):
                check(ddpm)


def test_masks_and_tensors_with_the_shape_of_the_time_may_have_any_dtype() -> None:
    def net(x: Tensor, t: Tensor, condition: object) -> Tensor:
        mask, zeros = (t < 1).bfloat16(), torch.zeros_like(t, dtype=torch.bfloat16)
        return x * (mask + zeros + t.new_ones(3, dtype=torch.bfloat16))[:, None]

    check(net)


def test_a_network_whose_output_is_zero_is_checked_as_well() -> None:
    """As a DiT is before training: equal outputs prove nothing."""
    with pytest.raises(ValueError, match="rounds its time"):
        check(lambda x, t, condition: 0 * x * t.bfloat16().float()[:, None])
    check(lambda x, t, condition: 0 * x)


def test_a_rounded_second_time_is_found() -> None:
    def net(x: Tensor, t: Tensor, condition: object, end: Tensor) -> Tensor:
        return x * t[:, None] + end.bfloat16()[:, None]

    with pytest.raises(ValueError, match="rounds its time"):
        check(net, end=torch.zeros(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *LOW_PRECISION])
def test_conversions_and_guidance_are_accepted_at_every_dtype_of_the_samples(
    dtype: torch.dtype,
) -> None:
    net = SmoothNetwork(4).to(dtype)

    def flow(x: Tensor, t: Tensor, condition: object, end: Tensor | None = None) -> Tensor:
        angle = t[:, None] * torch.arange(1, 5)
        return net(x, torch.zeros_like(t, dtype=dtype)) + torch.sin(angle).to(dtype)

    for converted in (
        from_rectified_flow(flow, 1000),
        from_rectified_flow(to_rectified_flow(flow)),
        from_edm(flow),
        from_vp(flow, VPSchedule.linear()),
        guided(from_rectified_flow(flow), lambda c: c, torch.ones(3), (0.0, 1.0)),
    ):
        check(converted, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dit_is_accepted_at_every_dtype_of_its_weights(dtype: torch.dtype) -> None:
    """Its sinusoids are cast, but not the time."""
    net, x = DiT().to(dtype), torch.randn(2, 1, 8, 8, dtype=dtype)
    require_unrounded_time(net, x, torch.tensor([0.3, 1.2]), torch.tensor([1, 2]))


def test_the_check_leaves_gradients_and_the_random_state_alone() -> None:
    net = SmoothNetwork(4, dropout=0.5)
    state = torch.get_rng_state()
    x, t = torch.randn(3, 4, requires_grad=True), torch.rand(3)
    state = torch.get_rng_state()
    require_unrounded_time(net, x, t, None)
    assert torch.equal(torch.get_rng_state(), state)
    assert x.grad is None


# ---- guard_time --------------------------------------------------------------------------------


class Timesteps(nn.Module):
    def forward(self, timesteps: Tensor) -> Tensor:
        return torch.sin(timesteps)


class SecondTimesteps(Timesteps):
    pass


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Timesteps(), nn.Linear(2, 2), SecondTimesteps()])

    def forward(self, t: Tensor, end: Tensor) -> Tensor:
        return self.blocks[0](t) + self.blocks[2](timesteps=end)


@low_precision
def test_guarded_embeddings_refuse_low_precision(dtype: torch.dtype) -> None:
    model, t = Model(), torch.zeros(3)
    handles = guard_time(model)
    assert len(handles) == 2
    model(t, t.double())
    model(t.long(), t)
    for times in ((t.to(dtype), t), (t, t.to(dtype))):
        with pytest.raises(ValueError, match=f"time has dtype {dtype}; allowed are float32"):
            model(*times)
    for handle in handles:
        handle.remove()
    model(t.to(dtype), t.to(dtype))


def test_our_embedding_is_guarded_too() -> None:
    assert len(guard_time(DiT())) == 2  # of t and of the end


def test_a_model_without_a_known_embedding_is_an_error() -> None:
    model = nn.Sequential(nn.Identity(), nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"Sequential has no timestep embedding, .* in `names`"):
        guard_time(model)
    assert len(guard_time(model, names=["Identity"])) == 1
