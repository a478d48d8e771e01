"""First and second derivatives equal finite differences."""

import pytest
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from jvp_attn import flash_attn_with_tangent
from tests.jvp_attn.attention_cases import Case, small_tiles

CASES = {
    "full": Case(batch=1, seqlen_q=2, seqlen_k=3, heads=1, heads_k=1, head_dim=2, head_dim_v=1),
    "causal": Case(batch=2, seqlen_q=3, seqlen_k=3, heads=1, heads_k=1, head_dim=1, causal=True),
    "grouped heads": Case(batch=1, seqlen_q=2, seqlen_k=2, heads=4, heads_k=2, head_dim_v=2),
}
over_cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def leaves(case: Case, *names: str) -> tuple[Tensor, ...]:
    return tuple(case.data()[name].requires_grad_() for name in names)


@over_cases
def test_first_derivatives_equal_finite_differences(case: Case) -> None:
    with small_tiles(scores=1, rows=2):
        assert gradcheck(case.ours, leaves(case, "q", "k", "v"), check_forward_ad=True)


@over_cases
def test_second_derivatives_equal_finite_differences(
    case: Case,
) -> None:
    with small_tiles(scores=1, rows=2):
        assert gradgradcheck(case.ours, leaves(case, "q", "k", "v"), check_fwd_over_rev=True)


@over_cases
@pytest.mark.parametrize("with_tangent", ["qkv", "q", "kv"])
def test_gradients_through_the_tangent_equal_finite_differences(
    case: Case, with_tangent: str
) -> None:
    tangent_names = [f"t{x}" for x in with_tangent]

    def outputs(q: Tensor, k: Tensor, v: Tensor, *tangents: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(tangent_names, tangents, strict=True))
        return flash_attn_with_tangent(q, k, v, **named, causal=case.causal, return_lse=True)

    with small_tiles(scores=1, rows=2):
        assert gradcheck(outputs, leaves(case, "q", "k", "v", *tangent_names))
