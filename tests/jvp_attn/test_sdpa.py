"""`scaled_dot_product_attention` agrees with torch's function and has every derivative."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from jvp_attn import scaled_dot_product_attention
from tests.jvp_attn.attention_cases import (
    Tensors,
    assert_close,
    outputs_and_gradients,
    peak_and_largest_allocation,
    randn,
    small_tiles,
)

SEQLEN_Q, SEQLEN_K, HEAD_DIM, HEAD_DIM_V = 5, 7, 4, 6

Shape = tuple[int, ...]


def torch_math(*args: Any, **options: Any) -> Tensor:
    """torch's function, by its backend MATH, which has all derivatives."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*args, **options)


def random_data(of_query: Shape, of_key: Shape, of_value: Shape) -> dict[str, Tensor]:
    """Primals and tangents, by the leading dimensions of query, key and value."""
    shapes = {
        "q": (*of_query, SEQLEN_Q, HEAD_DIM),
        "k": (*of_key, SEQLEN_K, HEAD_DIM),
        "v": (*of_value, SEQLEN_K, HEAD_DIM_V),
    }
    return {f"{t}{x}": randn(*shape, seed=t + x) for x, shape in shapes.items() for t in ("", "t")}


def assert_like_torch(data: dict[str, Tensor], **options: Any) -> None:
    """Output, tangent, and gradients through both for all primals and tangents are torch's."""

    def derivatives(attention: Callable[..., Tensor]) -> dict[str, Tensor]:
        def in_a_tuple(*args: Tensor) -> Tensors:
            return (attention(*args, **options),)

        return outputs_and_gradients(in_a_tuple, data)

    assert_close(derivatives(scaled_dot_product_attention), derivatives(torch_math))


def test_the_signature_is_torchs() -> None:
    schema = torch.ops.aten.scaled_dot_product_attention.default._schema
    ours = inspect.signature(scaled_dot_product_attention).parameters.values()
    keyword_only = inspect.Parameter.KEYWORD_ONLY
    assert [(p.name, p.kind is keyword_only) for p in ours] == [
        (argument.name, argument.kwarg_only) for argument in schema.arguments
    ]
    assert [p.default for p in list(ours)[3:]] == [None, 0.0, False, None, False]


# ----------------------------------------------------------------------------
# Shapes

LEADING_DIMENSIONS: list[tuple[Shape, Shape, Shape]] = [
    ((), (), ()),
    ((3,), (3,), (3,)),
    ((3,), (1,), (1,)),
    ((), (3,), ()),
    ((2, 4), (2, 4), (2, 4)),
    ((2, 4), (1, 4), (2, 1)),
    ((2, 4), (1, 1), (1, 1)),
    ((1, 4), (2, 1), (2, 1)),
    ((2, 4), (4,), ()),
    ((3, 2, 4), (3, 2, 4), (3, 2, 4)),
    ((1, 2, 4), (3, 1, 4), (2, 1)),
    ((2, 3, 1, 2), (2, 3, 1, 2), (2, 3, 1, 2)),
]


@pytest.mark.parametrize("leading", LEADING_DIMENSIONS, ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"scale": 0.3}], ids=["plain", "causal", "scale"]
)
def test_any_number_of_leading_dimensions_broadcast(
    leading: tuple[Shape, Shape, Shape], options: dict[str, Any]
) -> None:
    assert_like_torch(random_data(*leading), **options)


@pytest.mark.parametrize(
    "leading",
    [
        ((2, 6), (2, 3), (2, 3)),
        ((2, 6), (2, 3), (2, 2)),
        ((2, 6), (2, 1), (2, 6)),
        ((2, 6), (1, 2), (2, 2)),
        ((6,), (2,), (2,)),
        ((3, 2, 6), (3, 2, 2), (2, 2)),
    ],
    ids=str,
)
def test_heads_are_grouped_with_enable_gqa(leading: tuple[Shape, Shape, Shape]) -> None:
    assert_like_torch(random_data(*leading), enable_gqa=True)


@pytest.mark.parametrize(
    ("of_query", "of_keys"),
    [
        ((0, 2, 5), (0, 2, 7)),
        ((2, 2, 0), (2, 2, 7)),
        ((2, 2, 5), (2, 2, 0)),
        ((0, 2, 5), (1, 2, 7)),
    ],
    ids=str,
)
def test_sizes_may_be_zero(of_query: Shape, of_keys: Shape) -> None:
    query, key = randn(*of_query, HEAD_DIM, seed="q"), randn(*of_keys, HEAD_DIM, seed="k")
    value = randn(*of_keys, HEAD_DIM_V, seed="v")
    out = scaled_dot_product_attention(query, key, value)
    assert torch.equal(out, torch_math(query, key, value))


# ----------------------------------------------------------------------------
# Masks


def visible(*shape: int) -> Tensor:
    """A random boolean mask; the first key is visible to every row."""
    mask = randn(*shape, seed="visible") > 0
    mask[..., 0] = True
    return mask


def with_mask(
    data: dict[str, Tensor], kind: str, *shape: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Data and options for a mask with derivatives or without."""
    if kind == "boolean":
        return data, {"attn_mask": visible(*shape)}
    masks = {x: randn(*shape, seed=x) for x in ("attn_mask", "tattn_mask")}
    masks["attn_mask"] = masks["attn_mask"].masked_fill(~visible(*shape), -torch.inf)
    return {**data, **masks}, {}


@pytest.mark.parametrize("kind", ["boolean", "additive"])
@pytest.mark.parametrize("of_mask", list(product((1, 2), (1, 3), (1, 4))), ids=str)
def test_a_mask_may_vary_along_any_leading_dimension(of_mask: Shape, kind: str) -> None:
    data = random_data(*3 * ((2, 3, 4),))
    data, options = with_mask(data, kind, *of_mask, SEQLEN_Q, SEQLEN_K)
    assert_like_torch(data, **options)


@pytest.mark.parametrize("kind", ["boolean", "additive"])
@pytest.mark.parametrize(
    ("leading", "of_mask"),
    [
        ((2, 4), (SEQLEN_K,)),
        ((2, 4), (1, SEQLEN_K)),
        ((2, 4), (SEQLEN_Q, 1)),
        ((2, 4), (2, 1, 1, SEQLEN_K)),
        ((2, 4), (4, SEQLEN_Q, SEQLEN_K)),
        ((3,), (SEQLEN_Q, SEQLEN_K)),
        ((3,), (3, 1, SEQLEN_K)),
        ((), (SEQLEN_Q, SEQLEN_K)),
        ((2, 3, 4), (3, 1, 1, SEQLEN_K)),
    ],
    ids=str,
)
def test_a_mask_may_have_fewer_and_smaller_dimensions(
    leading: Shape, of_mask: Shape, kind: str
) -> None:
    data, options = with_mask(random_data(*3 * (leading,)), kind, *of_mask)
    assert_like_torch(data, **options)


@pytest.mark.parametrize("of_mask", list(product((1, 2), (1, 3), (1,))), ids=str)
def test_a_mask_is_never_copied(of_mask: Shape) -> None:
    seqlen = 256
    query = randn(2, 3, 1, seqlen, HEAD_DIM, seed="q")
    mask = visible(*of_mask, seqlen, seqlen)
    with small_tiles(scores=2**10, rows=1):
        _, largest = peak_and_largest_allocation(
            lambda: scaled_dot_product_attention(query, query, query, attn_mask=mask)
        )
    assert largest < mask[0, 0].nbytes


def test_a_mask_may_be_float32_for_float64_queries() -> None:
    data = random_data((2, 4), (2, 4), (2, 4))
    mask = randn(SEQLEN_Q, SEQLEN_K, seed="mask").float()
    assert_like_torch(data, attn_mask=mask)


def test_fully_masked_rows_are_0_and_have_no_gradient() -> None:
    data = random_data((2, 4), (2, 4), (2, 4))
    mask = visible(SEQLEN_Q, SEQLEN_K)
    mask[2] = False
    actual = outputs_and_gradients(
        lambda *qkv: (scaled_dot_product_attention(*qkv, attn_mask=mask),), data
    )
    for name in ("out", "out_tangent", "grad_q", "grad_tq"):
        assert not actual[name][..., 2, :].any()
        assert actual[name][..., 3, :].all()
    assert all(x.isfinite().all() for x in actual.values())


@pytest.mark.parametrize("bias", [causal_upper_left, causal_lower_right])
def test_the_causal_biases_of_torch_work(bias: Callable[[int, int], Tensor]) -> None:
    data = random_data((2, 4), (2, 4), (2, 4))
    assert_like_torch(data, attn_mask=bias(SEQLEN_Q, SEQLEN_K))


# ----------------------------------------------------------------------------
# Data types and layout


FLOAT32, HALVES, FLOAT64 = (
    (torch.float32, torch.float32, torch.float32),
    (torch.float32, torch.bfloat16, torch.float16),
    (torch.float64, torch.float64, torch.float64),
)


@pytest.mark.parametrize(
    ("dtypes", "of_mask"),
    [
        *product((FLOAT32, HALVES), (None, torch.bool, torch.float32, torch.bfloat16)),
        *product((FLOAT64,), (None, torch.bool, torch.float64)),
    ],
    ids=str,
)
def test_autocast_casts_as_torch_does(
    dtypes: tuple[torch.dtype, ...], of_mask: torch.dtype | None
) -> None:
    data = random_data((2, 4), (2, 4), (2, 4))
    q, k, v = (data[x].to(dtype) for x, dtype in zip("qkv", dtypes, strict=True))
    mask = None if of_mask is None else visible(SEQLEN_Q, SEQLEN_K).to(of_mask)
    with torch.autocast("cpu", torch.bfloat16):
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask)
        dtype = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).dtype
    assert out.dtype == dtype
    if mask is not None and mask.is_floating_point():
        mask = mask.to(dtype)
    explicit = scaled_dot_product_attention(q.to(dtype), k.to(dtype), v.to(dtype), attn_mask=mask)
    assert torch.equal(out, explicit)


def test_the_layout_is_that_of_torchs_fused_attention() -> None:
    """Contiguous as (batch, seqlen, heads, head_dim), which models make of it next."""
    query = randn(2, 4, SEQLEN_Q, HEAD_DIM, seed="q")
    strides = F.scaled_dot_product_attention(query, query, query).stride()
    assert scaled_dot_product_attention(query, query, query).stride() == strides
    out, tangent = torch.func.jvp(
        lambda x: scaled_dot_product_attention(x, x, x), (query,), (query.sin(),)
    )
    assert out.stride() == tangent.stride() == strides


# ----------------------------------------------------------------------------
# Unsupported arguments, besides those of test_bad_sdpa.py

Q = torch.zeros(2, 4, SEQLEN_Q, HEAD_DIM)

UNSUPPORTED: dict[str, tuple[Callable[..., Any], type[Exception], str]] = {
    "nested tensors": (
        lambda f: f(*3 * [torch.nested.nested_tensor(list(Q), layout=torch.jagged)]),
        NotImplementedError,
        "query is a nested tensor.*flash_attn_varlen_jvp",
    ),
    "a mask that is not a tensor": (
        lambda f: f(Q, Q, Q, [[True]]),
        TypeError,
        "attn_mask must be a torch.Tensor or None, got list",
    ),
    "a mask of more dimensions than the scores": (
        lambda f: f(Q[0], Q[0], Q[0], torch.zeros(1, 1, 5, 5)),
        ValueError,
        r"attn_mask has shape \(1, 1, 5, 5\), .* \(4, 5, 5\)",
    ),
    "a causal bias for other lengths": (
        lambda f: f(Q, Q, Q, causal_upper_left(5, 6)),
        ValueError,
        "attn_mask is a causal bias for 5 queries and 6 keys, .* 5 and 5",
    ),
    "a changed causal bias": (
        lambda f: f(Q, Q, Q, causal_upper_left(5, 5)[None]),
        TypeError,
        "attn_mask is the result of an operation on a causal bias",
    ),
    "a causal bias and is_causal": (
        lambda f: f(Q, Q, Q, causal_upper_left(5, 5), is_causal=True),
        ValueError,
        "attn_mask and is_causal=True exclude each other",
    ),
    "a scale by its place, as in torch": (
        lambda f: f(Q, Q, Q, None, 0.0, False, 0.5),
        TypeError,
        "positional",
    ),
}


@pytest.mark.parametrize("what", UNSUPPORTED)
def test_unsupported_arguments_raise(what: str) -> None:
    call, error, message = UNSUPPORTED[what]
    with pytest.raises(error, match=message):
        call(scaled_dot_product_attention)
