"""Rows whose scores are all huge, beside ordinary rows: data whose exact results are known.

Each query has a kind. Huge scores are sums of small integers and powers of two, which are exact in
float32, so that the formulas in float64 say what is right at any magnitude.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import cycle
from math import inf

import torch
from torch import Tensor

from tests.kernels.reference import INPUTS, Problem

SCALE = 2.0  # a power of two, so that scaling is exact
# Columns of K: a constant; 0, 1, 2 or 3; 1 or -1.
LEVEL, STEP, SIGN = range(3)
TILE = (
    64  # rows: huge and ordinary ones alternate in every second tile, the others have no huge one
)


@dataclass(frozen=True)
class Products:
    """The scores of a row by Q Kᵀ: level + step · (key's step) + sign · (key's sign)."""

    level: float = 0
    step: float = 0
    sign: float = 0


@dataclass(frozen=True)
class Biases:
    """The mask of a row, for keys whose sign is 1 and -1; None is ordinary."""

    plus: float
    minus: float | None
    step: float = 0  # as in Products


# Values beyond the range of the dtype are replaced by its smallest and largest ones.
PRODUCTS = {
    "ties": Products(level=2.0**27),
    "steps": Products(level=2.0**22, step=1),
    "negative steps": Products(level=-(2.0**20), step=1),
    "1e30": Products(sign=2.0**100),
    "-max": Products(level=-4e38),
    "max": Products(sign=4e38),
    "threshold": Products(sign=200),
}
MASKS = {
    "ties": Biases(1e8, 1e8),
    "steps": Biases(-1e6, -1e6, step=1),
    "-max": Biases(-4e38, -4e38),
    "-max or hidden": Biases(-4e38, -inf),
    "-max or ordinary": Biases(-4e38, None),
    "1e30": Biases(-1e30, 1e30),
    "hidden": Biases(-inf, -inf),
}


def kinds_of_rows(names: Iterable[str], rows: int) -> list[str]:
    """A kind for each row: "ordinary" or one of the names."""
    huge = [row for row in range(rows) if row // TILE % 2 == 0 and row % 2 == 0]
    kinds = ["ordinary"] * rows
    for row, kind in zip(huge, cycle(names), strict=False):
        kinds[row] = kind
    return kinds


def signs(keys: int) -> Tensor:
    """(keys,), 1 or -1"""
    return 1 - 2 * (torch.arange(keys) % 3 > 0).double()


def huge_inputs(
    problem: Problem, shapes: dict[str, tuple[int, ...]], kinds: list[str], dtype: torch.dtype
) -> dict[str, Tensor]:
    """All INPUTS, rounded to elements; row vectors in float32.

    Args:
        problem: if it has a mask, that makes scores huge; otherwise Q Kᵀ does.
        shapes: of INPUTS.
        kinds: of the rows of q.
        dtype: of the elements.
    """
    random = torch.Generator().manual_seed(0)
    x = {name: torch.randn(shapes[name], generator=random, dtype=torch.float64) for name in INPUTS}
    q, k, tk = x["q"], x["k"], x["tk"]
    half = q.shape[-1] // 2
    k[..., half:] = 0  # these columns of q have gradients but no influence on scores
    constant = 64.0 if dtype == torch.float16 else 1.0  # float16 has no huge q
    k[..., LEVEL] = constant
    k[..., STEP] = torch.arange(k.shape[1])[:, None] % 4
    k[..., SIGN] = signs(k.shape[1])[:, None]
    q[..., :half] /= 4 * SCALE
    q[..., : SIGN + 1] = 0
    tk[..., : SIGN + 1] = 0  # T is ordinary
    largest = torch.finfo(dtype).max / SCALE
    for row, kind in enumerate(kinds):
        if kind == "ordinary":
            continue
        score = PRODUCTS[kind] if problem.mask is None else Products(step=MASKS[kind].step)
        if score.step or problem.mask is None:
            q[:, row, :, :half] = 0
        level = score.level / constant / SCALE
        q[:, row, :, LEVEL] = min(max(level, -largest), largest)
        q[:, row, :, STEP] = score.step / SCALE
        q[:, row, :, SIGN] = min(largest, score.sign / SCALE)
    for name in ("grad_out", "grad_tout", "grad_lse", "grad_mu"):
        # Gradients of k are multiples of q.
        x[name] *= 2.0**-3 if dtype == torch.float16 else 2.0**-12
    return {n: y.float() if y.ndim == 3 else y.to(dtype) for n, y in x.items()}


def huge_mask(kinds: list[str], shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    """(heads, rows, keys)"""
    random = torch.Generator().manual_seed(1)
    mask = torch.randn(shape, generator=random, dtype=torch.float64)
    largest, plus = torch.finfo(dtype).max, signs(shape[2]) > 0
    for row, kind in enumerate(kinds):
        if kind == "ordinary":
            continue
        for keys, value in ((plus, MASKS[kind].plus), (~plus, MASKS[kind].minus)):
            if value is not None:
                mask[:, row, keys] = value if value == -inf else min(max(value, -largest), largest)
    return mask.to(dtype)
