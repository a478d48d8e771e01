"""Shapes, masks, tangents and blocks that nobody thought of."""

from attention_cases import Case, assert_close, outputs_and_gradients, small_blocks
from hypothesis import given, settings
from hypothesis import strategies as st


@st.composite
def cases(draw: st.DrawFn) -> Case:
    heads_k = draw(st.integers(1, 3))
    return Case(
        batch=draw(st.integers(1, 3)),
        seqlen_q=draw(st.integers(1, 12)),
        seqlen_k=draw(st.integers(1, 12)),
        heads=heads_k * draw(st.integers(1, 3)),
        heads_k=heads_k,
        head_dim=draw(st.integers(1, 9)),
        head_dim_v=draw(st.integers(1, 9)),
        causal=draw(st.booleans()),
        softmax_scale=draw(st.none() | st.floats(-2, 2)),
        with_tangent=draw(st.sampled_from(["q", "k", "v", "qk", "qv", "kv", "qkv"])),
    )


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(case=cases(), scores=st.integers(1, 500), rows=st.integers(1, 6))
def test_all_that_derives_from_attention_is_that_of_the_naive_formula(
    case: Case, scores: int, rows: int
) -> None:
    data = case.data()
    with small_blocks(scores, rows):
        ours = outputs_and_gradients(case.ours, data)
    assert_close(ours, outputs_and_gradients(case.naive, data), tolerance=1e-11)
