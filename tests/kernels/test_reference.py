"""The reference agrees with torch's derivatives of the naive formula, masks included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.reference import INPUTS, Problem, attention, never_seen

Inputs = dict[str, Tensor]


def inputs_of(q: tuple[int, ...], k: tuple[int, ...], head_dim_v: int) -> Inputs:
    """All inputs, for q and k of these shapes."""
    generator = torch.Generator().manual_seed(0)
    v, out, row = (*k[:3], head_dim_v), (*q[:3], head_dim_v), (q[0], q[2], q[1])
    shapes = (q, k, v, q, k, v, out, out, row, row)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in zip(INPUTS, shapes, strict=True)
    }


def naive(x: Inputs, scale: float, visible: Tensor, bias: Tensor) -> dict[str, Tensor]:
    """The same as `attention`, by torch's own derivatives; visible is (batch, heads, M, N)."""
    group = x["q"].shape[2] // x["k"].shape[2]

    def formula(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        k, v = (y.repeat_interleave(group, dim=2) for y in (k, v))
        weights = (scale * torch.einsum("bihd,bjhd->bhij", q, k) + bias).exp() * visible
        total = weights.sum(-1)
        # Rows that see no key divide 0 by 1, and their lse is log 0.
        dead = total == 0
        out = torch.einsum("bhij,bjhd->bihd", weights / (total + dead)[..., None], v)
        return out, (total + dead).log()

    leaves = {name: y.clone().requires_grad_() for name, y in x.items()}
    primals, tangents = ([leaves[prefix + n] for n in "qkv"] for prefix in ("", "t"))
    (out, lse), (tout, mu) = torch.func.jvp(formula, tuple(primals), tuple(tangents))
    paired = (("grad_out", out), ("grad_tout", tout), ("grad_lse", lse), ("grad_mu", mu))
    total = sum((leaves[name] * output).sum() for name, output in paired)
    gradients = torch.autograd.grad(total, primals + tangents)
    lse = lse.masked_fill(~visible.any(-1), -torch.inf)
    results = {"out": out, "tout": tout, "lse": lse, "mu": mu}
    return results | {f"grad_{n}": g for n, g in zip(INPUTS, gradients, strict=False)}


def assert_same(actual: Inputs, expected: Inputs) -> None:
    for name, y in expected.items():
        torch.testing.assert_close(actual[name], y, rtol=1e-11, atol=1e-11, msg=name)


VISIBLE = {
    "no": lambda i, j, m, n: True,
    "bottom_right": lambda i, j, m, n: j <= i + n - m,
    "top_left": lambda i, j, m, n: j <= i,
}


def visible_keys(causal: str, m: int, n: int) -> Tensor:
    """(m, n)"""
    return torch.tensor([[VISIBLE[causal](i, j, m, n) for j in range(n)] for i in range(m)])


@pytest.mark.parametrize("causal", VISIBLE)
@pytest.mark.parametrize(("m", "n"), [(5, 7), (7, 5), (6, 6)])
def test_reference_agrees_with_torch_derivatives(m: int, n: int, causal: str) -> None:
    x = inputs_of((2, m, 4, 3), (2, n, 2, 3), 6)
    visible = visible_keys(causal, m, n).expand(2, 4, m, n)
    expected = naive(x, -0.7, visible, torch.zeros(1))
    assert_same(attention(Problem(-0.7, causal), x), expected)


def test_absent_inputs_are_zero() -> None:
    x = inputs_of((1, 5, 2, 3), (1, 6, 2, 3), 4)
    for name in ("tk", "grad_tout", "grad_lse"):
        x[name].zero_()
    expected = attention(Problem(0.5), x)
    present = {n: y for n, y in x.items() if n not in ("tk", "grad_tout", "grad_lse")}
    assert_same(attention(Problem(0.5), present), expected)


@pytest.mark.parametrize("pattern", range(16))
@pytest.mark.parametrize("boolean", [True, False], ids=["boolean", "additive"])
def test_masks_broadcast(boolean: bool, pattern: int) -> None:
    x = inputs_of((2, 5, 4, 3), (2, 6, 2, 3), 3)
    full = (2, 4, 5, 6)
    shape = [size if pattern >> i & 1 else 1 for i, size in enumerate(full)]
    generator = torch.Generator().manual_seed(1)
    visible = torch.rand(shape, generator=generator) < 0.6
    bias = torch.randn(shape, generator=generator, dtype=torch.float64)
    if boolean:
        mask, bias = visible, torch.zeros(1)
    else:
        mask = bias.masked_fill(~visible, -torch.inf)
    expected = naive(x, 0.5, visible.expand(full), bias)
    assert_same(attention(Problem(0.5, mask=mask), x), expected)


@pytest.mark.parametrize("causal", VISIBLE)
def test_packed_and_padded_sequences_agree_with_each_sequence_alone(causal: str) -> None:
    starts_q, starts_k, used = (0, 3, 3, 8, 10), (0, 4, 7, 7, 12), (3, 3, 0, 1)
    x = inputs_of((1, 11, 2, 3), (1, 13, 1, 3), 4)
    problem = Problem(0.5, causal, None, starts_q, starts_k, used)
    actual = attention(problem, x)
    for i in range(4):
        rows, keys = slice(*starts_q[i : i + 2]), slice(starts_k[i], starts_k[i] + used[i])
        alone = {
            n: y[..., rows] if y.ndim == 3 else y[:, keys if n in ("k", "v", "tk", "tv") else rows]
            for n, y in x.items()
        }
        m, n = rows.stop - rows.start, used[i]
        visible = visible_keys(causal, m, n).reshape(m, n).bool().expand(1, 2, m, n)
        for name, expected in naive(alone, 0.5, visible, torch.zeros(1)).items():
            place = rows if name.removeprefix("grad_") not in ("k", "v", "tk", "tv") else keys
            part = actual[name]
            part = part[..., place] if part.ndim == 3 else part[:, place]
            assert_same({name: part}, {name: expected})
    for name in ("grad_k", "grad_v", "grad_tk", "grad_tv"):
        assert (actual[name][:, 3] == 0).all()  # padding
        assert (actual[name][:, 12] == 0).all()  # in no sequence


def test_a_batch_may_be_padded() -> None:
    x = inputs_of((2, 5, 2, 3), (2, 6, 2, 3), 3)
    visible = torch.arange(6) < torch.tensor([4, 6])[:, None, None, None]
    expected = naive(x, 0.5, visible.expand(2, 2, 5, 6), torch.zeros(1))
    assert_same(attention(Problem(0.5, seqused_k=(4, 6)), x), expected)


def test_never_seen_finds_the_keys_that_no_row_sees() -> None:
    x = inputs_of((1, 3, 2, 3), (1, 6, 1, 3), 3)
    mask = torch.tensor([[False, True, False], [False, False, True]]).repeat(1, 2)[:, None]
    problem = Problem(0.5, "top_left", mask[None])
    assert never_seen(problem, x["q"], x["k"])[0, :, 0].tolist() == [True, False, False] + 3 * [
        True
    ]
