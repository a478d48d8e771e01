"""Rows whose scores are all huge: in lse = max + log(sum) the logarithm is lost beside the maximum.

Additive masks have such rows: text encoders fill rows with finfo.min, others with −1e4 or −1e6. The
scores here are exactly representable, so that each derivative has one right value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import jvp_attn
from jvp_attn import (
    flash_attn_jvp,
    flash_attn_varlen_jvp,
    flash_attn_with_tangent,
    merge_attention,
)
from tests.jvp_attn.attention_cases import (
    HALF_TOLERANCE,
    Case,
    Named,
    assert_close,
    assert_exact_to_two_roundings,
    named,
    outputs_and_gradients,
    projection,
    with_tangents,
)
from tests.jvp_attn.data_kinds import in_dtype
from tests.jvp_attn.test_func_transforms import grad_of_grad, jvp_of_grad
from tests.jvp_attn.test_precision import assert_at_most_twice_the_error, over_dtypes

CASE = Case(2, 37, 41, head_dim=8, head_dim_v=8, softmax_scale=0.5)
SMALL = replace(CASE, batch=1, seqlen_q=3, seqlen_k=5, heads=2, heads_k=1)


def integers(case: Case) -> dict[str, Tensor]:
    """The data of a case; q and k are small integers, whose products are exact."""
    data = case.data()
    return data | {x: data[x].round() for x in "qk"}


def filled(value: float, multiple: int = 1) -> Callable[[Case], Named]:
    """A mask that fills every other row with a value. q·k are multiples of a number."""

    def data_of(case: Case) -> Named:
        data = integers(case)
        mask = torch.zeros(case.seqlen_q, case.seqlen_k, dtype=torch.float64)
        mask[::2] = value
        mask[2::5, 1::2] = -torch.inf
        mask[1] = -torch.inf
        return data | {"q": multiple * data["q"], "attn_mask": mask}

    return data_of


def product(q: float, k: float) -> Callable[[Case], Named]:
    """Scores of q · k / 2, the same for all keys of every other row; the other columns vanish."""

    def data_of(case: Case) -> Named:
        data = dict(integers(case))
        for name in ("q", "k", "tk"):
            data[name] = data[name].clone()
        data["q"][..., 0] = 0
        data["q"][:, ::2, :, 0] = q
        data["k"][..., 0] = k
        data["tk"][..., 0] = 0
        return data

    return data_of


LARGEST, SMALLEST = torch.finfo(torch.bfloat16).max, torch.finfo(torch.float32).min
KINDS: dict[str, Callable[[Case], Named]] = {
    "mask of -1e4": filled(-1e4),
    "mask of -1e6": filled(-1e6),
    "mask of 2^23": filled(2.0**23),
    "mask of -2^25": filled(-(2.0**25), multiple=8),
    "mask of 1e30": filled(1e30),
    "mask of -1e30": filled(-1e30),
    "mask of finfo.min": filled(SMALLEST),
    "mask of finfo.max": filled(LARGEST),
    "products of 2^17": product(2.0**15, 8),
    "products of -2^27": product(-(2.0**28), 1),
    "products of 2^100": product(2.0**101, 1),
    "products of -2^120": product(-(2.0**120), 2),
}
over_kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
over_backends = pytest.mark.parametrize("computed_by", ["cpu", "tiled"], indirect=True)


def fits(data: Named, dtype: torch.dtype) -> bool:
    """Whether the numbers of q and k are finite in a dtype; masks may be float32."""
    return all(bool(data[x].to(dtype).isfinite().all()) for x in "qk")


def rounded(data: Named, dtype: torch.dtype) -> dict[str, Tensor]:
    """The data in a dtype, a mask with half precision in float32."""
    mask = {x: y.float() for x, y in data.items() if x == "attn_mask" and dtype.itemsize == 2}
    return in_dtype(data, dtype) | mask


@over_backends
@over_kinds
def test_derivatives_in_float64_equal_the_naive_formula(kind: Callable[[Case], Named]) -> None:
    data = kind(CASE)
    ours = outputs_and_gradients(CASE.ours, data)
    assert_close(ours, outputs_and_gradients(CASE.naive, data))


@pytest.mark.parametrize("derivative", [jvp_of_grad, grad_of_grad])
@over_backends
@over_kinds
def test_second_derivatives_in_float64_equal_the_naive_formula(
    kind: Callable[[Case], Named], derivative: Any
) -> None:
    data = kind(SMALL)
    x, t = ([data[f"{prefix}{name}"] for name in "qkv"] for prefix in ("", "t"))

    def of(attention: Callable[..., tuple[Tensor, ...]]) -> Mapping[str, Tensor]:
        def out(*x: Tensor) -> tuple[Tensor]:
            return (attention(*x, data.get("attn_mask"))[0],)

        return named(derivative(out, tuple(x), tuple(t)))

    assert_close(of(SMALL.ours), of(SMALL.naive))


@over_dtypes
@over_kinds
def test_all_outputs_and_gradients_have_at_most_twice_the_error_of_torch(
    kind: Callable[[Case], Named], dtype: torch.dtype
) -> None:
    data = rounded(kind(CASE), dtype)
    if not fits(data, dtype):
        pytest.skip("q and k are beyond the range of the dtype")
    through = projection("out", "out_tangent", "mu", dtype=dtype)
    ours = outputs_and_gradients(CASE.ours, data, through=through)
    torchs = outputs_and_gradients(CASE.naive, in_dtype(data, torch.float32), through=through)
    exact = outputs_and_gradients(CASE.naive, in_dtype(data, torch.float64), through=through)
    # The gradient of a float32 mask is computed in the precision of q.
    dtypes = {name: x.dtype for name, x in ours.items()} | {"grad_attn_mask": dtype}
    assert_at_most_twice_the_error(
        *({name: x.to(dtypes[name]) for name, x in of.items()} for of in (ours, torchs)), exact
    )


@over_backends
@pytest.mark.parametrize("seqlen_k", [41, 600])
def test_keys_of_weight_zero_do_not_change_the_precision_of_tangents(seqlen_k: int) -> None:
    """Even if their tangents are large: padding is often masked by finfo.min instead of −inf."""
    case = replace(CASE, seqlen_k=seqlen_k, softmax_scale=None, dtype=torch.float32)
    data = dict(case.data())
    padding = slice(seqlen_k // 2) if seqlen_k > 512 else slice(0, seqlen_k, 2)
    data["attn_mask"] = torch.zeros(case.seqlen_q, seqlen_k)
    data["attn_mask"][:, padding] = SMALLEST
    data["tk"][:, padding] *= 1e6
    assert_at_most_twice_the_error(
        with_tangents(case.ours, data),
        with_tangents(case.naive, data),
        with_tangents(case.naive, in_dtype(data, torch.float64)),
    )


@pytest.mark.parametrize("computed_by", ["emulated"], indirect=True)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("padded", [slice(0, None, 2), slice(80), slice(40, None)], ids=str)
def test_keys_of_weight_zero_do_not_change_the_precision_of_the_cuda_kernels(
    head_dim: int, padded: slice
) -> None:
    """Every other key, all keys of the first tile, or all but those."""
    case = replace(CASE, batch=1, seqlen_k=150, head_dim=head_dim, head_dim_v=head_dim)
    data = rounded(dict(case.data(), attn_mask=torch.zeros(37, 150)), torch.bfloat16)
    data["attn_mask"][:, padded] = SMALLEST
    data["tk"][:, padded] *= 1e6
    exact = with_tangents(case.naive, in_dtype(data, torch.float64))
    assert_exact_to_two_roundings(with_tangents(case.ours, data), exact)


# ----------------------------------------------------------------------------
# lse in two parts


@pytest.mark.parametrize("computed_by", ["cpu", "tiled", "emulated"], indirect=True)
def test_packed_sequences_equal_a_batch() -> None:
    data = {
        x: y.requires_grad_()
        for x, y in in_dtype(product(-(2.0**15), 8)(CASE), torch.float16).items()
    }
    q, k, v = (data[x] for x in "qkv")
    lengths = (torch.tensor([0, n, 2 * n], dtype=torch.int32) for n in (37, 41))
    packed = flash_attn_varlen_jvp(
        *(x.flatten(0, 1) for x in (q, k, v)), *lengths, 37, 41, softmax_scale=0.5
    )
    dense = flash_attn_jvp(q, k, v, softmax_scale=0.5)
    gradients = (torch.autograd.grad(x.sum(), (q, k, v)) for x in (packed, dense))
    assert_close(*map(named, gradients), 0)


@pytest.mark.parametrize("computed_by", ["cpu", "tiled", "math", "emulated"], indirect=True)
@pytest.mark.parametrize("value", [0.0, -1e6, 2.0**100, SMALLEST])
def test_merged_parts_equal_attention_over_all_keys(value: float) -> None:
    data = filled(value)(CASE)
    mask = data.pop("attn_mask")

    def merged(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        parts = [
            flash_attn_jvp(
                *(q, k[:, keys], v[:, keys]),
                attn_mask=mask[:, keys],
                softmax_scale=0.5,
                return_lse_lo=True,
            )
            for keys in (slice(0, 3), slice(3, 24), slice(24, 41))
        ]
        return merge_attention([merge_attention(parts[:2]), parts[2]])[:2]

    ours = outputs_and_gradients(merged, data)
    exact = outputs_and_gradients(lambda *x: CASE.naive(*x, mask), data)
    assert_close(ours, exact)


@pytest.mark.parametrize("computed_by", ["cpu", "tiled", "math", "emulated"], indirect=True)
@pytest.mark.parametrize("value", [0.0, -1e6, 2.0**100, SMALLEST])
def test_lse_and_its_low_order_part_are_the_maximum_and_the_log_of_the_sum(value: float) -> None:
    data = filled(value)(CASE)
    options: Any = {"attn_mask": data["attn_mask"], "softmax_scale": 0.5, "return_lse_lo": True}
    q, k, v, tq, tk, tv = (data[x] for x in ("q", "k", "v", "tq", "tk", "tv"))
    _, lse, lse_lo = flash_attn_jvp(q, k, v, **options)
    *_, lse_with_tangent, _, lo_with_tangent = flash_attn_with_tangent(
        q, k, v, tq, tk, tv, **options
    )
    assert torch.equal(lse, lse_with_tangent)
    assert torch.equal(lse_lo, lo_with_tangent)

    scores = 0.5 * q.transpose(1, 2) @ k.transpose(1, 2).mT.repeat_interleave(2, 1)
    scores = scores + data["attn_mask"]
    maximum = scores.amax(-1)
    log_sum = (scores - maximum[..., None]).logsumexp(-1)
    seen = maximum > -torch.inf
    assert seen.any()
    assert not seen.all()
    half = jvp_attn.current_backend() == "emulated"
    # In float32 a part of the difference is lost where |max| is below log(sum).
    tolerance = 8 * HALF_TOLERANCE if half else 1e-13
    sums = ((lse - maximum) + lse_lo)[seen]
    assert (sums - log_sum[seen]).abs().max() <= tolerance * log_sum[seen].max()
    assert torch.equal(lse[~seen], torch.full_like(lse[~seen], -torch.inf))
    assert torch.equal(lse_lo[~seen], torch.zeros_like(lse_lo[~seen]))


def filled_everywhere(x: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Attention whose scores are all huge; the logarithm of the sum is all in lse_lo."""
    mask = torch.full((x.shape[1], k.shape[1]), 1e30, dtype=x.dtype)
    return flash_attn_jvp(x, k, v, attn_mask=mask, return_lse_lo=True)


def test_the_low_order_part_under_vmap() -> None:
    data = SMALL.data()
    q, k, v = (torch.stack([data[x], data[f"t{x}"]]) for x in "qkv")
    each = [filled_everywhere(*x) for x in zip(q, k, v, strict=True)]
    expected = tuple(map(torch.stack, zip(*each, strict=True)))
    assert_close(named(torch.func.vmap(filled_everywhere)(q, k, v)), named(expected), 0)


def test_the_low_order_part_of_a_compiled_function(fresh_compiler: None) -> None:
    def merged(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        parts = [filled_everywhere(q, k[:, n], v[:, n]) for n in (slice(0, 1), slice(1, None))]
        return merge_attention(parts)

    data = SMALL.data()
    x, t = ([data[f"{prefix}{name}"] for name in "qkv"] for prefix in ("", "t"))

    def tangents(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return torch.func.jvp(merged, (q, k, v), tuple(t))

    compiled = torch.compile(tangents, fullgraph=True, backend="aot_eager")
    assert_close(named(compiled(*x)), named(tangents(*x)))


def test_the_low_order_part_has_no_derivative() -> None:
    q = SMALL.data()["q"].requires_grad_()
    x = SMALL.data()
    for name in ("cpu", "tiled", "math"):
        with jvp_attn.backend(name):
            _, lse, lse_lo = flash_attn_jvp(q, x["k"], x["v"], return_lse_lo=True)
            assert lse.requires_grad
            assert not lse_lo.requires_grad
            (_, _, _), (_, _, tangent) = torch.func.jvp(
                lambda q: flash_attn_jvp(q, x["k"], x["v"], return_lse_lo=True), (q,), (x["tq"],)
            )
            assert not tangent.any()
