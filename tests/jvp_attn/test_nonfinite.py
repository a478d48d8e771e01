"""NaN and infinity affect only the rows that attend to them, although 0 · ∞ is NaN.

This holds for the backends `cpu` and `tiled`. The CUDA kernels require finite keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.jvp_attn.attention_cases import (
    Case,
    Named,
    assert_close,
    outputs_and_gradients,
    part,
    projection,
    rows_of,
    small_tiles,
    with_tangents,
)
from tests.jvp_attn.packed_cases import PackedCase

pytestmark = pytest.mark.parametrize("computed_by", ["cpu", "tiled"], indirect=True)

INPUTS = ("q", "k", "v", "tq", "tk", "tv")
OUTPUTS = ("out", "lse", "out_tangent", "mu")
NONFINITE = {"NaN": torch.nan, "infinity": torch.inf, "minus infinity": -torch.inf}
over_nonfinite = pytest.mark.parametrize("nonfinite", NONFINITE.values(), ids=NONFINITE.keys())

# Six rows and five keys; each key is masked for some rows and visible to others.
VISIBLE = torch.tensor(
    [
        [1, 0, 0, 1, 0],
        [0, 1, 0, 0, 1],
        [1, 1, 1, 0, 0],
        [0, 0, 0, 0, 0],
        [1, 0, 1, 1, 1],
        [0, 1, 0, 1, 1],
    ],
    dtype=torch.bool,
)
CASE = Case(seqlen_q=6, seqlen_k=5)
BIAS = torch.zeros(6, 5, dtype=torch.float64).masked_fill(~VISIBLE, -torch.inf)
CAUSAL = torch.ones(6, 5, dtype=torch.bool).tril(5 - 6)
# Kind of mask → case, the mask, and which row attends to which key, (rows, keys).
MASKING: dict[str, tuple[Case, Mapping[str, Tensor], Tensor]] = {
    "a boolean mask": (CASE, {"attn_mask": VISIBLE}, VISIBLE),
    "an additive mask": (CASE, {"attn_mask": BIAS}, VISIBLE),
    "causal": (replace(CASE, causal=True), {}, CAUSAL),
    "causal and a mask": (
        replace(CASE, causal=True),
        {"attn_mask": VISIBLE},
        VISIBLE & CAUSAL,
    ),
}
over_masking = pytest.mark.parametrize("masking", MASKING.values(), ids=MASKING.keys())
# All rows in one tile, or each row in its own.
over_tilings = pytest.mark.parametrize("rows", [64, 2], ids=["one tile", "a tile for each row"])


@over_tilings
@over_masking
@over_nonfinite
@pytest.mark.parametrize("name", ["k", "v", "tk", "tv"])
def test_a_nonfinite_key_affects_only_the_rows_that_attend_to_it(
    name: str, nonfinite: float, masking: tuple[Case, Named, Tensor], rows: int
) -> None:
    case, mask, visible = masking
    key = 3
    clean = {**case.data(), **mask}
    data = {**clean, name: clean[name].clone()}
    data[name][:, key] = nonfinite
    attending = visible[:, key]

    def through_the_others(outputs: Named) -> Tensor:
        return projection()(rows_of(outputs, ~attending))

    with small_tiles(scores=1, rows=rows):
        found, expected = (
            outputs_and_gradients(case.ours, x, through=through_the_others) for x in (data, clean)
        )
    assert_close(*(rows_of(part(x, OUTPUTS), ~attending) for x in (found, expected)))
    for gradient in ("grad_q", "grad_tq"):
        assert_close(*({gradient: x[gradient][:, ~attending]} for x in (found, expected)))
    if math.isnan(nonfinite):
        affected = {"k": OUTPUTS, "v": ("out", "out_tangent"), "tk": ("out_tangent", "mu")}
        for output in affected.get(name, ("out_tangent",)):
            assert rows_of({output: found[output]}, attending)[output].isnan().all(), output


@over_tilings
@over_nonfinite
@pytest.mark.parametrize("name", ["k", "v", "tk", "tv"])
@pytest.mark.parametrize("kind", ["boolean", "additive", "causal at the top left"])
def test_a_key_masked_for_every_row_has_no_effect_and_no_gradient(
    kind: str, name: str, nonfinite: float, rows: int
) -> None:
    visible = torch.tensor([True, False, True, True, False])
    bias = torch.zeros(5, dtype=torch.float64).masked_fill(~visible, -torch.inf)
    case, mask = CASE, {"attn_mask": visible if kind == "boolean" else bias}
    if kind == "causal at the top left":
        visible = torch.arange(5) < 3
        case, mask = replace(CASE, seqlen_q=3, causal=True, torchs_interface=True), {}
    clean = {**case.data(), **mask}
    data = {**clean, name: clean[name].clone()}
    data[name][:, ~visible] = nonfinite
    with small_tiles(scores=1, rows=rows):
        found, expected = (outputs_and_gradients(case.ours, x) for x in (data, clean))
    assert_close(found, expected)
    for gradient in ("grad_k", "grad_v", "grad_tk", "grad_tv"):
        assert (found[gradient][:, ~visible] == 0).all(), gradient


@over_tilings
@over_nonfinite
@pytest.mark.parametrize("name", ["q", "tq"])
@pytest.mark.parametrize("kind", ["boolean", "additive", "causal"])
def test_a_fully_masked_row_has_no_effect_and_no_gradient(
    kind: str, name: str, nonfinite: float, rows: int
) -> None:
    alive = torch.tensor([True, False, True, False, True, True])
    bias = torch.zeros(6, 1, dtype=torch.float64).masked_fill(~alive[:, None], -torch.inf)
    case, mask = CASE, {"attn_mask": alive[:, None] if kind == "boolean" else bias}
    if kind == "causal":
        alive = torch.arange(6) >= 3
        case, mask = replace(CASE, seqlen_k=3, causal=True), {}
    clean = {**case.data(), **mask}
    data = {**clean, name: clean[name].clone()}
    data[name][:, ~alive] = nonfinite
    with small_tiles(scores=1, rows=rows):
        found, expected = (outputs_and_gradients(case.ours, x) for x in (data, clean))
    assert_close(found, expected)
    dead = rows_of(part(found, OUTPUTS), ~alive)
    assert (dead.pop("lse") == -torch.inf).all()
    dead |= {gradient: found[gradient][:, ~alive] for gradient in ("grad_q", "grad_tq")}
    assert all((x == 0).all() for x in dead.values())


@over_nonfinite
@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_the_tangent_of_a_masked_score_has_no_effect(kind: str, nonfinite: float) -> None:
    """Neither the tangent of the mask there, nor those of Q and K."""
    case = replace(CASE, mask="additive", mask_dims="qk", with_tangent="qkvm")
    clean = {**case.data(), "attn_mask": BIAS}
    data = {**clean, "tattn_mask": clean["tattn_mask"].masked_fill(~VISIBLE, nonfinite)}
    found, expected = (outputs_and_gradients(case.ours, x) for x in (data, clean))
    assert_close(found, expected)
    assert (found["grad_tattn_mask"][~VISIBLE] == 0).all()


@over_nonfinite
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("name", INPUTS)
def test_a_nonfinite_sequence_does_not_affect_the_others(
    name: str, causal: bool, nonfinite: float
) -> None:
    case = PackedCase((3, 4, 2), (2, 5, 3), beyond=2, causal=causal)
    second = {"q": slice(3, 7), "k": slice(2, 7)}
    clean = case.data()
    data = {**clean, name: clean[name].clone()}
    data[name][second["q" if "q" in name else "k"]] = nonfinite

    def others(found: Named) -> dict[str, Tensor]:
        """All but the second sequence."""
        by_token = {n: x.mT.clone() if n in ("lse", "mu") else x for n, x in found.items()}
        for n, x in by_token.items():
            x[second["k" if n[-1] in "kv" else "q"]] = 0
        return by_token

    with small_tiles(scores=1, rows=64):
        found, expected = (outputs_and_gradients(case.ours, x) for x in (data, clean))
    assert_close(others(found), others(expected))


@pytest.mark.parametrize("name", INPUTS)
def test_without_a_mask_nan_spreads_as_in_the_naive_formula(name: str) -> None:
    data = CASE.data()
    data[name][1, 2, 1] = torch.nan
    with small_tiles(scores=1, rows=4):
        found = outputs_and_gradients(CASE.ours, data)
    for n, x in outputs_and_gradients(CASE.naive, data).items():
        assert torch.equal(found[n].isnan(), x.isnan()), n
        assert_close({n: found[n].nan_to_num(0)}, {n: x.nan_to_num(0)})


def test_nan_or_infinity_in_a_mask_makes_its_row_nan() -> None:
    case = replace(CASE, mask="additive", mask_dims="qk")
    data = {**case.data(), "attn_mask": torch.zeros(6, 5, dtype=torch.float64)}
    for nonfinite in (torch.nan, torch.inf):
        data["attn_mask"][2, 3] = nonfinite
        outputs = with_tangents(case.ours, data)
        for name, x in rows_of(outputs, torch.tensor([2])).items():
            assert x.isnan().all(), name
        for name, x in rows_of(outputs, torch.tensor([0, 1, 3, 4, 5])).items():
            assert x.isfinite().all(), name
