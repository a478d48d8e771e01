"""Every use of PyTorch in docs/composition.md is exact with every feature, or raises."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import jacfwd, jacrev

from jvp_attn import flash_attn_jvp, flash_attn_varlen_jvp
from tests.jvp_attn import composition_func as func
from tests.jvp_attn.attention_cases import (
    assert_close,
    named,
    peak_and_largest_allocation,
    randn,
    small_tiles,
)
from tests.jvp_attn.composition import (
    ORDER_TOO_HIGH,
    OTHER_USES,
    ROWS,
    TORCH_CANNOT,
    UNSUPPORTED,
    Check,
    Derivative,
)
from tests.jvp_attn.composition_features import FEATURES, Feature, naive_formula, torch_formula
from tests.jvp_attn.composition_table import PAGE, with_tables


def over(name: str, cells: Iterable[tuple[Any, Feature]]) -> pytest.MarkDecorator:
    """Pairs of a derivative, or a check, and a feature."""
    cells = list(cells)
    ids = [f"{x.__name__.strip('_')} of {feature.name.replace('`', '')}" for x, feature in cells]
    return pytest.mark.parametrize((name, "feature"), cells, ids=ids)


def derivative_of(derivative: Derivative, feature: Feature) -> Any:
    with small_tiles(scores=1, rows=2):
        return derivative(feature.ours, feature.primals(), feature.tangents())


CELLS = [(row, feature) for row in ROWS for feature in FEATURES]
EXACT = [(row, feature) for row, feature in CELLS if row.composes_with(feature)]
RAISING = [(row, feature) for row, feature in CELLS if not row.composes_with(feature)]


@over("derivative", ((d, feature) for row, feature in EXACT for d in row.derivatives))
def test_derivatives_equal_the_oracle(derivative: Derivative, feature: Feature) -> None:
    torch_can = feature.torch_has_it and derivative not in TORCH_CANNOT
    oracle = feature.oracle(torch_formula if torch_can else naive_formula)
    expected = derivative(oracle, feature.primals(), feature.tangents())
    assert_close(named(derivative_of(derivative, feature)), named(expected))


@over("check", ((check, feature) for row, feature in EXACT for check in row.checks))
def test_checks_pass(check: Check, feature: Feature) -> None:
    check(feature)


@over("derivative", ((d, feature) for row, feature in RAISING for d in row.derivatives))
def test_derivatives_of_tangents_of_too_high_order_raise(
    derivative: Derivative, feature: Feature
) -> None:
    with pytest.raises(NotImplementedError, match=ORDER_TOO_HIGH):
        derivative_of(derivative, feature)


@over("check", ((check, feature) for row, feature in RAISING for check in row.checks))
def test_checks_of_tangents_of_too_high_order_raise(check: Check, feature: Feature) -> None:
    with pytest.raises(NotImplementedError, match=ORDER_TOO_HIGH):
        check(feature)


@over(
    "derivative",
    ((d, feature) for row in UNSUPPORTED for d in row.derivatives for feature in FEATURES),
)
def test_unsupported_uses_raise(derivative: Derivative, feature: Feature) -> None:
    (row,) = (row for row in UNSUPPORTED if derivative in row.derivatives)
    with pytest.raises(row.error, match=row.message):
        derivative_of(derivative, feature)


# ----------------------------------------------------------------------------
# Memory

CU_SEQLENS = torch.tensor([[0, 1, 2], [0, 500, 1024]], dtype=torch.int32)
MANY_KEYS = {
    "flash_attn_jvp": flash_attn_jvp,
    "mask": partial(flash_attn_jvp, attn_mask=randn(1024, seed="mask")),
    "packed": lambda q, k, v: flash_attn_varlen_jvp(q[0], k[0], v[0], *CU_SEQLENS, 1, 524),
}


@pytest.mark.parametrize("attention", MANY_KEYS.values(), ids=MANY_KEYS.keys())
@pytest.mark.parametrize(("jacobian", "derivative"), [(jacfwd, func.jvp_), (jacrev, func.vjp_)])
def test_directions_of_a_jacobian_share_the_memory_of_the_primals(
    jacobian: Callable[..., Any], derivative: Derivative, attention: Callable[..., Tensor]
) -> None:
    q, k, v = (randn(2, n, 2, 4, seed=x) for x, n in {"q": 2, "k": 1024, "v": 1024}.items())

    def of_queries(q: Tensor) -> tuple[Tensor]:
        return (attention(q, k, v),)

    with small_tiles(scores=2**12, rows=1):
        of_one, _ = peak_and_largest_allocation(lambda: derivative(of_queries, (q,), (q.cos(),)))
        of_all, _ = peak_and_largest_allocation(lambda: jacobian(of_queries)(q))
    assert of_all - of_one < k.nbytes  # there are 32 directions


# ----------------------------------------------------------------------------
# The page


@pytest.mark.parametrize("path", [path for use in OTHER_USES for path in use.tests])
def test_the_tests_of_other_uses_exist(path: str) -> None:
    file, function = path.split("::")
    statements = ast.parse((Path(__file__).parents[1] / file).read_text("utf-8")).body
    assert function in {x.name for x in statements if isinstance(x, ast.FunctionDef)}


def test_the_page_has_the_tables_of_the_tests() -> None:
    page = PAGE.read_text("utf-8")
    assert page == with_tables(page)
