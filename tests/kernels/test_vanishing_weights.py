"""Keys whose weights vanish in a row cost it no accuracy, however large their tangents are.

P∘T is rounded relative to a reference tangent of each row. If a tile of keys that the row gives no
weight determined the reference, its tangents would drown those of the other keys.
"""

from __future__ import annotations

from itertools import cycle, islice

import pytest
import torch
from torch import Tensor

from jvp_attn.backends.kernel_table import KERNELS
from tests.kernels.problems import DTYPES
from tests.kernels.reference import ROW_VECTORS, Problem, attention
from tests.kernels.test_huge_scores import CASES as HUGE_CASES
from tests.kernels.test_huge_scores import HugeCase, fault_of, kernels_of_case, run

PIPELINES = ("forward jvp", "forward jvp, q", "tangent only")

# Kinds of rows: for which keys the scores are 200 below the others and the tangents about a
# million. The number is that of a column of K, which is 16 for these keys and 0 for others.
COLUMNS = {
    "the first tile": 0,
    "all but the last tile": 1,
    "all but the first tile": 2,
    "every second key": 3,
}
KINDS = ("none", *COLUMNS)
ROWS = 39

CASES = [case for case in HUGE_CASES if case[0] in PIPELINES and case[3] == "none"]


@pytest.mark.parametrize("case", CASES, ids=["-".join(map(str, case)) for case in CASES])
def test_tangents_of_vanishing_weights_cost_no_accuracy(case: HugeCase) -> None:
    kinds = list(islice(cycle(KINDS), ROWS))
    problem, inputs = Problem(softmax_scale=1.0), inputs_of(case, kinds)
    outputs = run(problem, inputs, case)
    exact = attention(problem, inputs)
    in_float32 = attention(problem, inputs, torch.float32)
    faults = []
    for name in ("out", "tout", "mu", "lse"):
        for kind in KINDS:
            rows = torch.tensor([i for i, found in enumerate(kinds) if found == kind])
            dim = 2 if name in ROW_VECTORS else 1
            actual, right, rounded = (
                x[name].index_select(dim, rows) for x in (outputs, exact, in_float32)
            )
            fault = fault_of(actual, right, rounded.to(actual.dtype))
            faults += [f"{name} of rows where {kind} vanishes {fault}"] if fault else []
    assert not faults, faults


def inputs_of(case: HugeCase, kinds: list[str]) -> dict[str, Tensor]:
    """The inputs that the case's pipeline reads, for rows of these kinds."""
    _, tile = KERNELS[kernels_of_case(case)[-1]].tile or (0, 0)
    head_dim, random = case[2], torch.Generator().manual_seed(0)
    shapes = {"q": (1, len(kinds), 1, head_dim), "k": (1, 2 * tile + 25, 1, head_dim)}
    names = ("q", "k", "v", "tq") if case[0].endswith("q") else ("q", "k", "v", "tq", "tk", "tv")
    x = {
        name: torch.randn(shapes["q" if name.endswith("q") else "k"], generator=random)
        for name in names
    }
    special = len(COLUMNS)
    x["q"][..., special:] /= head_dim**0.5
    for name in names:
        if name not in ("v", "tv"):
            x[name][..., :special] = 0
    x["k"][:, :tile, :, COLUMNS["the first tile"]] = 16
    x["k"][:, : 2 * tile, :, COLUMNS["all but the last tile"]] = 16
    x["k"][:, tile:, :, COLUMNS["all but the first tile"]] = 16
    x["k"][:, ::2, :, COLUMNS["every second key"]] = 16
    for row, kind in enumerate(kinds):
        if kind in COLUMNS:
            x["q"][:, row, :, COLUMNS[kind]] = -12.5
            x["tq"][:, row, :, COLUMNS[kind]] = 60000
    return {name: tensor.to(DTYPES[case[1]]) for name, tensor in x.items()}
