"""Whatever PyTorch can do with a function, it can do with attention: exactly, or it raises."""

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
    small_blocks,
)
from tests.jvp_attn.composition import (
    ELSEWHERE,
    NOT_OF_THIS_ORDER,
    REFUSALS,
    ROWS,
    TORCH_CANNOT,
    Check,
    Derivative,
)
from tests.jvp_attn.composition_features import FEATURES, Feature, naive_formula, torch_formula
from tests.jvp_attn.composition_table import README, with_tables


def over(name: str, cells: Iterable[tuple[Any, Feature]]) -> pytest.MarkDecorator:
    """Over pairs of a derivative or a check, and a feature."""
    cells = list(cells)
    ids = [f"{x.__name__.strip('_')} of {feature.name.replace('`', '')}" for x, feature in cells]
    return pytest.mark.parametrize((name, "feature"), cells, ids=ids)


def derivative_of(derivative: Derivative, feature: Feature) -> Any:
    with small_blocks(scores=1, rows=2):
        return derivative(feature.ours, feature.primals(), feature.tangents())


CELLS = [(row, feature) for row in ROWS for feature in FEATURES]
EXACT = [(row, feature) for row, feature in CELLS if row.composes_with(feature)]
REFUSED = [(row, feature) for row, feature in CELLS if not row.composes_with(feature)]


@over("derivative", ((d, feature) for row, feature in EXACT for d in row.derivatives))
def test_derivative_is_that_of_the_oracle(derivative: Derivative, feature: Feature) -> None:
    torch_can = feature.torch_has_it and derivative not in TORCH_CANNOT
    oracle = feature.oracle(torch_formula if torch_can else naive_formula)
    expected = derivative(oracle, feature.primals(), feature.tangents())
    assert_close(named(derivative_of(derivative, feature)), named(expected))


@over("check", ((check, feature) for row, feature in EXACT for check in row.checks))
def test_tracers_and_checkers_agree(check: Check, feature: Feature) -> None:
    check(feature)


@over("derivative", ((d, feature) for row, feature in REFUSED for d in row.derivatives))
def test_tangents_have_no_such_derivative(derivative: Derivative, feature: Feature) -> None:
    with pytest.raises(NotImplementedError, match=NOT_OF_THIS_ORDER):
        derivative_of(derivative, feature)


@over("check", ((check, feature) for row, feature in REFUSED for check in row.checks))
def test_checkers_find_no_such_derivative(check: Check, feature: Feature) -> None:
    with pytest.raises(NotImplementedError, match=NOT_OF_THIS_ORDER):
        check(feature)


@over(
    "derivative",
    ((d, feature) for row in REFUSALS for d in row.derivatives for feature in FEATURES),
)
def test_what_is_not_supported_is_refused(derivative: Derivative, feature: Feature) -> None:
    (row,) = (row for row in REFUSALS if derivative in row.derivatives)
    with pytest.raises(row.error, match=row.words):
        derivative_of(derivative, feature)


# ----------------------------------------------------------------------------
# Memory

CU_SEQLENS = torch.tensor([[0, 1, 2], [0, 500, 1024]], dtype=torch.int32)
OF_MANY_KEYS = {
    "flash_attn_jvp": flash_attn_jvp,
    "mask": partial(flash_attn_jvp, attn_mask=randn(1024, seed="mask")),
    "packed": lambda q, k, v: flash_attn_varlen_jvp(q[0], k[0], v[0], *CU_SEQLENS, 1, 524),
}


@pytest.mark.parametrize("attention", OF_MANY_KEYS.values(), ids=OF_MANY_KEYS.keys())
@pytest.mark.parametrize(("jacobian", "derivative"), [(jacfwd, func.jvp_), (jacrev, func.vjp_)])
def test_primals_are_shared_between_directions(
    jacobian: Callable[..., Any], derivative: Derivative, attention: Callable[..., Tensor]
) -> None:
    q, k, v = (randn(2, n, 2, 4, seed=x) for x, n in {"q": 2, "k": 1024, "v": 1024}.items())

    def of_queries(q: Tensor) -> tuple[Tensor]:
        return (attention(q, k, v),)

    with small_blocks(scores=2**12, rows=1):
        of_one, _ = peak_and_largest_allocation(lambda: derivative(of_queries, (q,), (q.cos(),)))
        of_all, _ = peak_and_largest_allocation(lambda: jacobian(of_queries)(q))
    assert of_all - of_one < k.nbytes  # there are 32 directions


# ----------------------------------------------------------------------------
# README


@pytest.mark.parametrize("path", [path for use in ELSEWHERE for path in use.tests])
def test_what_is_tested_elsewhere_is_tested_there(path: str) -> None:
    file, function = path.split("::")
    statements = ast.parse((Path(__file__).parents[1] / file).read_text("utf-8")).body
    assert function in {x.name for x in statements if isinstance(x, ast.FunctionDef)}


def test_the_tables_of_readme_are_those_of_the_tests() -> None:
    readme = README.read_text("utf-8")
    assert readme == with_tables(readme)
