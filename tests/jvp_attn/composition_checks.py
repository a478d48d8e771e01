"""Checks of a feature by tracers, gradcheck and meta tensors, for the tests of composition.

Each function makes its assertions for one feature.
"""

from __future__ import annotations

from typing import Any

from torch._subclasses import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.func import jvp, linearize
from torch.fx.experimental.proxy_tensor import make_fx

from tests.jvp_attn.attention_cases import Tensors, assert_close, named
from tests.jvp_attn.composition_autograd import leaves
from tests.jvp_attn.composition_features import Feature
from tests.jvp_attn.composition_func import jvp_of_grad, vjp_, vjp_of_jvp

Metadata = dict[str, tuple[Any, ...]]


def derivatives(feature: Feature, x: Tensors, t: Tensors) -> Any:
    """By all four primitives, if the feature has a jvp."""
    f = feature.ours
    if feature.is_tangent:
        return f(*x), vjp_(f, x, t)
    return f(*x), vjp_(f, x, t), vjp_of_jvp(f, x, t), jvp_of_grad(f, x, t)


# ----------------------------------------------------------------------------
# Checkers of derivatives


def gradcheck_(feature: Feature) -> None:
    forward_mode = not feature.is_tangent
    assert gradcheck(
        feature.ours,
        leaves(feature.primals()),
        check_forward_ad=forward_mode,
        check_batched_grad=True,
        check_batched_forward_grad=False,  # make_dual, torch's own, cannot be batched that way
    )


def gradgradcheck_(feature: Feature) -> None:
    assert gradgradcheck(
        feature.ours,
        leaves(feature.primals()),
        check_fwd_over_rev=True,
        check_batched_grad=True,
        fast_mode=True,  # along one random direction instead of all
    )


def linearize_(feature: Feature) -> None:
    x, t = feature.primals(), feature.tangents()
    outputs, push_forward = linearize(feature.ours, *x)
    assert_close(named((outputs, push_forward(*t))), named(jvp(feature.ours, x, t)))


# ----------------------------------------------------------------------------
# Meta and fake tensors


def metadata(results: Any) -> Metadata:
    return {name: (x.shape, x.stride(), x.dtype) for name, x in named(results).items()}


def on_meta(feature: Feature) -> None:
    x, t = feature.primals(), feature.tangents()
    found = derivatives(feature, *(tuple(y.to("meta") for y in part) for part in (x, t)))
    assert {y.device.type for y in named(found).values()} == {"meta"}
    assert metadata(found) == metadata(derivatives(feature, x, t))


def in_fake_tensor_mode(feature: Feature) -> None:
    x, t = feature.primals(), feature.tangents()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        found = derivatives(feature, *(tuple(map(mode.from_tensor, part)) for part in (x, t)))
    assert metadata(found) == metadata(derivatives(feature, x, t))


# ----------------------------------------------------------------------------
# Tracers


def make_fx_(feature: Feature) -> None:
    x, t = feature.primals(), feature.tangents()
    n = len(x)
    graph = make_fx(
        lambda *xt: derivatives(feature, xt[:n], xt[n:]),
        tracing_mode="fake",
        _allow_non_fake_inputs=True,
    )(*x, *t)
    others = tuple(2 * y for y in x)
    assert_close(named(graph(*others, *t)), named(derivatives(feature, others, t)))
