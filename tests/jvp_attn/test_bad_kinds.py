"""An argument of the wrong kind is an error that names it, for every argument of every function."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import jvp
from torch.masked import masked_tensor

import jvp_attn
from jvp_attn import (
    flash_attn_jvp,
    flash_attn_varlen_jvp,
    flash_attn_with_tangent,
    merge_attention,
    scaled_dot_product_attention,
)
from tests.jvp_attn.attention_cases import randn
from tests.jvp_attn.bad_arguments import DENSE, PACKED, over_backends

Arguments = dict[str, Any]

# ----------------------------------------------------------------------------
# Good calls, in float32, which every layout supports


def singles(arguments: Arguments) -> Arguments:
    return {
        name: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in arguments.items()
    }


MASK = torch.zeros(5, 7)
LENGTHS = torch.tensor([3, 7], dtype=torch.int32)
PADDED = {**singles(DENSE), "attn_mask": MASK, "seqused_k": LENGTHS}
GOOD: dict[Callable[..., Any], Arguments] = {
    flash_attn_jvp: PADDED,
    flash_attn_with_tangent: {
        **PADDED,
        "tattn_mask": MASK,
        **{f"t{name}": PADDED[name] for name in "qkv"},
    },
    flash_attn_varlen_jvp: singles(PACKED),
    scaled_dot_product_attention: {
        "query": randn(2, 4, 5, 3, seed="q", dtype=torch.float32),
        "key": randn(2, 4, 7, 3, seed="k", dtype=torch.float32),
        "value": randn(2, 4, 7, 6, seed="v", dtype=torch.float32),
        "attn_mask": MASK,
    },
}
FLAGS = {
    flash_attn_jvp: ("causal", "deterministic", "return_lse"),
    flash_attn_with_tangent: ("causal", "deterministic", "return_lse"),
    flash_attn_varlen_jvp: ("causal", "deterministic", "return_lse"),
    scaled_dot_product_attention: ("is_causal", "enable_gqa"),
}
OPTIONAL = {"attn_mask", "seqused_k", "tq", "tk", "tv", "tattn_mask"}


def scale_of(function: Callable[..., Any]) -> str:
    return "scale" if function is scaled_dot_product_attention else "softmax_scale"


# ----------------------------------------------------------------------------
# Tensors


def csr(x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return (x[None] if x.ndim == 1 else x).to_sparse_csr()


def quantized(x: Tensor) -> Tensor:
    return torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8)


def jagged(x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([x, x], layout=torch.jagged)


def self_masked(x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return masked_tensor(x, torch.ones_like(x, dtype=torch.bool))


# What the argument becomes, and a word of the message that says what was given.
KINDS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "sparse COO": (Tensor.to_sparse, "sparse_coo"),
    "sparse CSR": (csr, "sparse_csr"),
    "mkldnn": (lambda x: x.float().to_mkldnn(), "_mkldnn"),
    "jagged": (jagged, "nested"),
    "quantized": (quantized, "qint8"),
    "masked": (self_masked, "MaskedTensor"),
    "complex": (lambda x: x.to(torch.complex64), "complex64"),
    "int64": (Tensor.long, "int64"),
    "a list": (Tensor.tolist, "list"),
    "numpy": (lambda x: x.numpy(), "ndarray"),
    "a string": (str, "str"),
    "a number": (lambda x: 1.0, "float"),
}


def tensor_arguments() -> Iterator[Any]:
    for function, good in GOOD.items():
        for name in (x for x, value in good.items() if isinstance(value, Tensor)):
            for kind in KINDS:
                yield pytest.param(function, name, kind, id=f"{function.__name__}, {name}, {kind}")


@over_backends
@pytest.mark.parametrize(("function", "name", "kind"), tensor_arguments())
def test_every_tensor_has_its_kind(
    function: Callable[..., Any], name: str, kind: str, backend: str
) -> None:
    change, given = KINDS[kind]
    bad = {**GOOD[function], name: change(GOOD[function][name])}
    with (
        jvp_attn.backend(backend),
        pytest.raises((TypeError, NotImplementedError), match=rf"\b{name}\b.*\b{given}") as raised,
    ):
        function(**bad)
    assert is_ours(raised)


def is_ours(raised: pytest.ExceptionInfo[Exception]) -> bool:
    """Whether this package raised the error, not torch."""
    return "jvp_attn" in str(raised.traceback[-1].path)


@pytest.mark.parametrize("function", GOOD, ids=lambda function: function.__name__)
def test_none_is_an_error_where_a_tensor_is_required(function: Callable[..., Any]) -> None:
    for name, value in GOOD[function].items():
        if isinstance(value, Tensor) and name not in OPTIONAL:
            with pytest.raises(TypeError, match=rf"\b{name} must be a torch.Tensor, got NoneType"):
                function(**{**GOOD[function], name: None})


PART = (torch.zeros(2, 5, 4, 6), torch.zeros(2, 4, 5))


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("which", ["out", "lse"])
@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_dense_tensors(kind: str, which: str, place: int) -> None:
    change, given = KINDS[kind]
    parts = [list(PART), list(PART)]
    parts[place][which == "lse"] = change(parts[place][which == "lse"])
    with pytest.raises((TypeError, ValueError), match=rf"parts\[\d\].*\b{given}") as raised:
        merge_attention([tuple(part) for part in parts])
    assert is_ours(raised)


# ----------------------------------------------------------------------------
# Switches and numbers


@pytest.mark.parametrize("value", ["no", 0, 1, None, np.True_, torch.tensor(True), []], ids=repr)
@pytest.mark.parametrize("function", GOOD, ids=lambda function: function.__name__)
def test_switches_are_bools(function: Callable[..., Any], value: Any) -> None:
    for name in FLAGS[function]:
        given = re.escape(type(value).__name__)
        with pytest.raises(TypeError, match=rf"{name} must be True or False, got {given}"):
            function(**{**GOOD[function], name: value})


NUMBERS = [2, 0.5, np.float32(0.5), np.float64(0.5), np.float16(0.5), np.int64(2), Fraction(1, 2)]
NO_NUMBERS = ["0.5", True, np.True_, 1j, np.complex64(1), Decimal("0.5"), [0.5], np.array(0.5)]


@pytest.mark.parametrize("function", GOOD, ids=lambda function: function.__name__)
def test_a_scale_is_a_number_of_python_or_numpy(function: Callable[..., Any]) -> None:
    scale, good = scale_of(function), GOOD[function]
    for number in NUMBERS:
        ours, expected = (function(**{**good, scale: x}) for x in (number, float(number)))
        for x, y in zip(ours, expected, strict=True):
            assert torch.equal(x, y)
    for value in [*NO_NUMBERS, torch.tensor(0.5)]:
        given = type(value).__name__
        with pytest.raises(TypeError, match=rf"^{scale} must be a number or None, got {given}\b"):
            function(**{**good, scale: value})
    for value in (float("nan"), float("inf"), -np.float32("inf"), 10**400):
        with pytest.raises(ValueError, match=f"^{scale} must be finite"):
            function(**{**good, scale: value})


@over_backends
def test_a_scale_of_numpy_gives_the_same_derivatives(backend: str) -> None:
    def outputs(scale: Any) -> tuple[Tensor, ...]:
        q, k, v = (DENSE[x] for x in "qkv")
        return jvp(lambda q: flash_attn_jvp(q, k, v, softmax_scale=scale), (q,), (q,))

    with jvp_attn.backend(backend):
        for x, y in zip(outputs(np.float32(0.25)), outputs(0.25), strict=True):
            assert torch.equal(x, y)


def test_max_seqlens_may_be_numbers_of_numpy() -> None:
    good = GOOD[flash_attn_varlen_jvp]
    lengths = {x: np.int32(good[x]) for x in ("max_seqlen_q", "max_seqlen_k")}
    assert torch.equal(flash_attn_varlen_jvp(**{**good, **lengths}), flash_attn_varlen_jvp(**good))
    for name in lengths:
        for value in ("7", 7.0, np.float32(7), True, torch.tensor(7), None, [7]):
            with pytest.raises(TypeError, match=f"{name} must be an integer"):
                flash_attn_varlen_jvp(**{**good, name: value})
        with pytest.raises(ValueError, match=rf"{name} is 1{30 * '0'}; it must be below 2\*\*63"):
            flash_attn_varlen_jvp(**{**good, name: 10**30})


@pytest.mark.parametrize("value", ["0", None, 0j, [], np.array(0.0), torch.tensor(0.0)], ids=repr)
def test_dropout_is_a_number(value: Any) -> None:
    with pytest.raises(TypeError, match=f"dropout_p must be a number, got {type(value).__name__}"):
        scaled_dot_product_attention(**GOOD[scaled_dot_product_attention], dropout_p=value)


@pytest.mark.parametrize("zero", [0, 0.0, False, np.float32(0), np.int64(0)], ids=repr)
def test_no_dropout_may_be_any_zero(zero: Any) -> None:
    """`self.training and self.dropout` is False in evaluation."""
    good = GOOD[scaled_dot_product_attention]
    out = scaled_dot_product_attention(**good, dropout_p=zero)
    assert torch.equal(out, scaled_dot_product_attention(**good))
