"""Bad tangents raise an error that says what is wrong and what is allowed."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch.func import jvp

from jvp_attn import flash_attn_jvp, flash_attn_with_tangent
from tests.jvp_attn.bad_arguments import (
    DENSE,
    BadCall,
    Table,
    over_backends,
    over_bad_calls,
    zeros,
)

PRIMALS_SHAPE = "a tangent must have its primal's shape"
TANGENTS: Table = {
    "tq is not a tensor": ({"tq": 0.0}, TypeError, "tq must be a torch.Tensor or None", "float"),
    "tq could be broadcast": (
        {"tq": zeros(1, 5, 4, 3)},
        ValueError,
        "tq has shape (1, 5, 4, 3) but its primal has (2, 5, 4, 3)",
        PRIMALS_SHAPE,
    ),
    "tk has another dtype": (
        {"tk": zeros(2, 7, 2, 3, dtype=torch.float32)},
        TypeError,
        "tk has dtype torch.float32 but its primal has torch.float64",
        "a tangent must have its primal's dtype",
    ),
    "tv has the shape of tk": (
        {"tv": zeros(2, 7, 2, 3)},
        ValueError,
        "tv has shape (2, 7, 2, 3) but its primal has (2, 7, 2, 6)",
        PRIMALS_SHAPE,
    ),
    "tv is on another device": (
        {"tv": zeros(2, 7, 2, 6, device="meta")},
        ValueError,
        "tv is on meta but its primal is on cpu",
        "a tangent must be on its primal's device",
    ),
    "tk is sparse": (
        {"tk": zeros(2, 7, 2, 3).to_sparse()},
        TypeError,
        "tk must be a dense tensor",
        "torch.sparse_coo",
    ),
    "a tangent of no mask": (
        {"tattn_mask": zeros(5, 7)},
        ValueError,
        "tattn_mask is given but attn_mask is not",
    ),
    "a tangent of a boolean mask": (
        {"attn_mask": zeros(5, 7).bool(), "tattn_mask": zeros(5, 7)},
        TypeError,
        "tattn_mask is given but attn_mask is boolean",
    ),
    "the tangent of a mask is not a tensor": (
        {"attn_mask": zeros(5, 7), "tattn_mask": 1.0},
        TypeError,
        "tattn_mask must be a torch.Tensor or None",
        "float",
    ),
    "the tangent of a mask could be broadcast": (
        {"attn_mask": zeros(5, 7), "tattn_mask": zeros(7)},
        ValueError,
        "tattn_mask has shape (7,) but its primal has (5, 7)",
        PRIMALS_SHAPE,
    ),
    "the tangent of a mask has another dtype": (
        {"attn_mask": zeros(5, 7), "tattn_mask": zeros(5, 7, dtype=torch.float32)},
        TypeError,
        "tattn_mask has dtype torch.float32 but its primal has torch.float64",
    ),
    "the tangent of a mask is on another device": (
        {"attn_mask": zeros(5, 7), "tattn_mask": zeros(5, 7, device="meta")},
        ValueError,
        "tattn_mask is on meta but its primal is on cpu",
    ),
}


@over_backends
@over_bad_calls(DENSE, {flash_attn_with_tangent: TANGENTS})
def test_the_error_says_what_is_wrong_what_was_given_and_what_is_allowed(
    call: BadCall, backend: str
) -> None:
    call.assert_raises(backend)


@pytest.mark.parametrize(
    "tangent",
    [zeros(1, 5, 4, 3), zeros(2, 5, 4)],
    ids=["that could be broadcast", "of other dimensions"],
)
def test_torch_raises_for_a_tangent_of_another_shape(tangent: Tensor) -> None:
    with pytest.raises(RuntimeError, match="forward gradient that has a different size"):
        jvp(lambda q: flash_attn_jvp(**{**DENSE, "q": q}), (DENSE["q"],), (tangent,))


@pytest.mark.parametrize("name", ["q", "k", "v", "attn_mask"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_dual_number_whose_tangent_has_another_dtype_raises(
    dtype: torch.dtype, name: str
) -> None:
    """torch itself accepts it."""
    primals = {x: y.float() for x, y in {**DENSE, "attn_mask": zeros(5, 7)}.items()}
    x = primals[name]
    message = rf"\b{name}\b.*{dtype}.*torch.float32"
    with pytest.raises(TypeError, match=message):
        jvp(lambda y: flash_attn_jvp(**{**primals, name: y}), (x,), (x.to(dtype),))
    leaf = x.clone().requires_grad_()
    with fwAD.dual_level(), pytest.raises(TypeError, match=message):
        flash_attn_jvp(**{**primals, name: fwAD.make_dual(leaf, x.to(dtype))})
