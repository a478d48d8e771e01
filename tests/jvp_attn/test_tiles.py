"""The tiling of attention into blocks of batches, heads and rows changes no result."""

from dataclasses import replace

import pytest

from jvp_attn.backends.tiles import head_blocks
from jvp_attn.types import AttentionOptions, Causal, Inputs
from tests.jvp_attn.attention_cases import (
    Case,
    assert_close,
    outputs_and_gradients,
    small_tiles,
    without_tangents,
)

Sizes = dict[str, list[int]]


def block_sizes(case: Case) -> Sizes:
    """The numbers of batches, key heads and rows of successive blocks."""
    causal = Causal.BOTTOM_RIGHT if case.causal else Causal.NO
    blocks = list(head_blocks(Inputs(*case.primals().values()), AttentionOptions(1.0, causal)))
    cuts = {
        "batches": {(block.batches.start, block.batches.stop) for block in blocks},
        "key_heads": {(block.key_heads.start, block.key_heads.stop) for block in blocks},
        "rows": {(r.rows.start, r.rows.stop) for r in blocks[0].row_blocks()},
    }
    assert len(blocks) == len(cuts["batches"]) * len(cuts["key_heads"])
    return {name: [stop - start for start, stop in sorted(cut)] for name, cut in cuts.items()}


one_head = Case(batch=1, heads=1, heads_k=1)
CUTS: dict[str, tuple[Case, int, int, Sizes]] = {
    # name: case, scores and rows as in `small_tiles`, the expected blocks
    "a row less than a block": (replace(one_head, seqlen_q=3), 1, 4, {"rows": [3]}),
    "one block": (replace(one_head, seqlen_q=4), 1, 4, {"rows": [4]}),
    "a row more than a block": (replace(one_head, seqlen_q=5), 1, 4, {"rows": [4, 1]}),
    "blocks and a rest": (replace(one_head, seqlen_q=11), 1, 4, {"rows": [4, 4, 3]}),
    "causal": (
        replace(one_head, seqlen_q=11, seqlen_k=11, causal=True), 1, 4, {"rows": [4, 4, 3]},
    ),
    "causal, more keys": (
        replace(one_head, seqlen_q=7, seqlen_k=13, causal=True), 1, 3, {"rows": [3, 3, 1]},
    ),
    "causal, fully masked rows": (
        replace(one_head, seqlen_q=13, seqlen_k=7, causal=True), 1, 3, {"rows": [3, 3, 1]},
    ),
    "grouped heads": (
        Case(heads=12, heads_k=3, causal=True), 1, 8, {"key_heads": [1, 1, 1], "rows": [2, 2, 1]},
    ),
    "more heads in a group than rows in a block": (
        Case(seqlen_q=3, heads=8, heads_k=1), 1, 4, {"batches": [1, 1], "rows": [1, 1, 1]},
    ),
    "some heads of a batch": (
        Case(heads=10, heads_k=5), 150, 1, {"batches": [1, 1], "key_heads": [2, 2, 1]},
    ),
    "some batches": (
        Case(batch=5), 300, 1, {"batches": [2, 2, 1], "key_heads": [2]},
    ),
    "a mask, grouped heads": (
        Case(heads=6, heads_k=3, mask="additive", with_tangent="qkvm"), 1, 4,
        {"batches": [1, 1], "key_heads": [1, 1, 1], "rows": [2, 2, 1]},
    ),
    "a mask, some heads of a batch": (
        Case(heads=10, heads_k=5, mask="additive", mask_dims="b.qk", with_tangent="qm"), 150, 1,
        {"batches": [1, 1], "key_heads": [2, 2, 1]},
    ),
    "a mask, some batches": (
        Case(batch=5, mask="boolean", mask_dims="bh.k", causal=True), 300, 1,
        {"batches": [2, 2, 1], "key_heads": [2]},
    ),
    "all at once": (Case(), 1000, 1, {"batches": [2], "key_heads": [2], "rows": [5]}),
}  # fmt: skip


@pytest.mark.parametrize(("case", "scores", "rows", "sizes"), CUTS.values(), ids=CUTS.keys())
def test_tiling_changes_no_result(case: Case, scores: int, rows: int, sizes: Sizes) -> None:
    with small_tiles(scores, rows):
        found = block_sizes(case)
        ours = outputs_and_gradients(case.ours, case.data())
        primal = outputs_and_gradients(case.ours, case.primals(), evaluate=without_tangents)
    assert sizes.items() <= found.items()
    assert_close(ours, outputs_and_gradients(case.naive, case.data()))
    assert_close(
        primal, outputs_and_gradients(case.naive, case.primals(), evaluate=without_tangents)
    )


def test_tiling_with_the_default_sizes_changes_no_result() -> None:
    case = Case(batch=1, seqlen_q=1100, seqlen_k=1000, heads=2, heads_k=1, causal=True)
    assert len(block_sizes(case)["rows"]) > 2
    assert_close(
        outputs_and_gradients(case.ours, case.data()),
        outputs_and_gradients(case.naive, case.data()),
    )
