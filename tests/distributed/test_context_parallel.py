"""Networks whose tokens are split among ranks have the results and gradients of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from jvp_attn import scaled_dot_product_attention
from tests.distributed.context_parallel_cases import (
    CHECKPOINTS,
    FOUR_RANKS,
    KINDS,
    TWO_RANKS,
    Case,
    Layout,
    after_another_call,
    in_one_process,
    network,
    on_four_ranks,
    on_two_ranks,
    with_times_of_tokens,
)
from tests.distributed.ranks import run_on_ranks

pytestmark = pytest.mark.xdist_group("ranks")

Outcomes = list[dict[str, Any]]
OF_SAMPLES = ("value", "jvp_norm", "out", "tangent")  # not gradients


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return run_on_ranks(on_two_ranks, 2, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return run_on_ranks(on_four_ranks, 4, tmp_path_factory.mktemp("ranks"))


def error(y: Tensor, expected: Tensor) -> float:
    return float((y.double() - expected.double()).norm() / max(float(expected.norm()), 1e-12))


def require_equal(
    found: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype
) -> None:
    assert found.keys() == expected.keys()
    # Some layers of float64 networks are float32.
    values, gradients = (1e-6, 1e-5) if dtype == torch.float32 else (1e-14, 1e-7)
    for name, y in expected.items():
        tolerance = values if name in OF_SAMPLES else gradients
        assert error(found[name], y) <= tolerance, (name, error(found[name], y))


def require_equal_to_one_process(layout: Layout, case: Case, outcomes: Outcomes) -> None:
    expected = in_one_process(case)
    for rank, outcome in enumerate(outcomes):
        samples = slice(None)
        if layout.data > 1:  # one sample each
            samples = slice(rank // (layout.ring * layout.ulysses), None, 2)
        of_rank = {n: y[samples] if n in OF_SAMPLES else y for n, y in expected.items()}
        require_equal(outcome[str(layout)][str(case)], of_rank, KINDS[case.kind].dtype)


@pytest.mark.parametrize(
    ("layout", "case"),
    [(layout, case) for layout, cases in TWO_RANKS.items() for case in cases],
    ids=str,
)
def test_two_ranks_equal_one_process(layout: Layout, case: Case, two_ranks: Outcomes) -> None:
    require_equal_to_one_process(layout, case, two_ranks)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "case"),
    [(layout, case) for layout, cases in FOUR_RANKS.items() for case in cases],
    ids=str,
)
def test_four_ranks_equal_one_process(layout: Layout, case: Case, four_ranks: Outcomes) -> None:
    require_equal_to_one_process(layout, case, four_ranks)


@pytest.mark.parametrize("method", CHECKPOINTS)
def test_checkpoints_know_their_tokens_after_a_call_with_others(
    method: str, two_ranks: Outcomes
) -> None:
    model = network(KINDS["wan"], 3, 0)
    expected = after_another_call(model, scaled_dot_product_attention, None)
    for outcome in two_ranks:
        found = outcome["checkpoints"][method]
        assert len(found) >= len(expected) / 2
        require_equal(found, {name: expected[name] for name in found}, torch.float32)


@pytest.mark.parametrize("kind", ["wan", "cosmos"])
def test_times_of_tokens_are_split(kind: str, two_ranks: Outcomes) -> None:
    model = network(KINDS[kind], 3, 0)
    expected = with_times_of_tokens(kind, scaled_dot_product_attention, model)
    for outcome in two_ranks:
        require_equal(outcome["times"][kind], expected, KINDS[kind].dtype)


def test_tangents_need_no_messages_of_their_own(two_ranks: Outcomes) -> None:
    """Two layers: query, key and value in one message, the output in another."""
    for outcome in two_ranks:
        assert outcome["messages"] == {
            "ulysses": {"all_to_all_single": 4, "all_gather_single": 1},
            "ring": {"batch_isend_irecv": 2, "all_gather_single": 1},
            "alone": {},
        }


@pytest.mark.parametrize(
    ("wrong", "message"),
    {
        "no plan": "NotImplementedError: there is no token plan for Linear",
        "no module": "names 'no_such_module', but WanTransformer3DModel has no such module",
        "no argument": "the argument 'image' of 'blocks.*', but WanTransformerBlock.forward has",
        "groups": "ValueError: ring has ranks [0, 1], ulysses [0, 1] and group [0, 1]",
        "twice": "ValueError: the tokens of this WanTransformer3DModel are split already",
        "mask": "NotImplementedError: attention over the tokens of several ranks got attn_mask",
        "causal": "NotImplementedError: attention over the tokens of several ranks got is_causal",
        "other keys": "RuntimeError: attention has query, key and value of shapes",
        "unsplit": "RuntimeError: a sequence has 45 tokens on this rank, but no sequence was split",
        "other attention": "RuntimeError: blocks.*.attn1 of a network whose tokens are split did",
    }.items(),
)
def test_what_is_unsupported_raises_on_every_rank(
    wrong: str, message: str, two_ranks: Outcomes
) -> None:
    for outcome in two_ranks:
        assert message in outcome["errors"][wrong]
