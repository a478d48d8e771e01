"""The reference: attention, its tangent and six gradients, in closed form.

For one head, with S = s Q Kᵀ + mask, P = softmax(S) and T = s (tQ Kᵀ + Q tKᵀ):

    O = P V    lse = logsumexp(S)    mu = rowsum(P∘T)    tO = (P∘(T − mu)) V + P tV

    Tc = T − mu         beta = dtO·O − g_mu      delta = dO·O + dtO·tO − g_lse
    B = dtO Vᵀ − beta    dT = P∘B              dS = P∘(dO Vᵀ + dtO tVᵀ + B∘Tc − delta)
    dQ = s (dS K + dT tK)       gtQ = s dT K       dV  = Pᵀ dO + (P∘Tc)ᵀ dtO
    dK = s (dSᵀ Q + dTᵀ tQ)     gtK = s dTᵀ Q      gtV = Pᵀ dtO
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Named = Mapping[str, Tensor]

INPUTS = ("q", "k", "v", "tq", "tk", "tv", "grad_out", "grad_tout", "grad_lse", "grad_mu")
# (batch, heads, rows)
ROW_VECTORS = ("lse", "lse_lo", "mu", "beta", "delta", "grad_lse", "grad_mu")
_ROW_RESULTS = ("lse", "mu", "beta", "delta", "mu_terms", "beta_terms", "delta_terms")
_ROW_RESULTS += ("beta_products", "delta_products")


@dataclass(frozen=True)
class Problem:
    """The settings of an attention problem.

    Attributes:
        softmax_scale: s.
        causal: "no"; "bottom_right", where row i of M sees column j of N if j ≤ i + N − M; or
            "top_left", if j ≤ i.
        mask: broadcasts to (batch, heads, M, N). Boolean, True where a row sees a key, or added to
            the scaled scores. Row 0 is the first of its sequence.
        cu_seqlens_q, cu_seqlens_k: where packed sequences start and end. Tensors then have a batch
            of 1 that holds them all.
        seqused_k: the number of keys of each sequence; the rest is padding.
    """

    softmax_scale: float
    causal: str = "no"
    mask: Tensor | None = None
    cu_seqlens_q: tuple[int, ...] | None = None
    cu_seqlens_k: tuple[int, ...] | None = None
    seqused_k: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Part:
    """One sequence of a problem: its place in the tensors, and its mask as a bias."""

    batch: int  # in tensors
    queries: slice
    keys: slice
    bias: Tensor  # (heads, queries, keys), −inf where a key is hidden


def parts(problem: Problem, q: Tensor, k: Tensor) -> Iterator[Part]:
    """The sequences of a problem; padding is in none of them."""
    packed = problem.cu_seqlens_q is not None or problem.cu_seqlens_k is not None
    starts = problem.cu_seqlens_q or problem.cu_seqlens_k or range(q.shape[0] + 1)
    for i in range(len(starts) - 1):
        queries = _rows(problem.cu_seqlens_q, i, q.shape[1])
        keys = _rows(problem.cu_seqlens_k, i, k.shape[1])
        if problem.seqused_k is not None:
            keys = slice(keys.start, min(keys.stop, keys.start + problem.seqused_k[i]))
        shape = (q.shape[2], queries.stop - queries.start, keys.stop - keys.start)
        yield Part(0 if packed else i, queries, keys, _bias(problem, i, *shape))


def _rows(starts: Sequence[int] | None, i: int, seqlen: int) -> slice:
    return slice(0, seqlen) if starts is None else slice(starts[i], starts[i + 1])


def _bias(problem: Problem, i: int, heads: int, queries: int, keys: int) -> Tensor:
    bias = torch.zeros(heads, queries, keys, dtype=torch.float64)
    if problem.causal != "no":
        diagonal = keys - queries if problem.causal == "bottom_right" else 0
        hidden = torch.ones(queries, keys, dtype=torch.bool).triu(diagonal + 1)
        bias = bias.masked_fill(hidden, -torch.inf)
    if problem.mask is not None:
        mask = problem.mask[i if problem.mask.shape[0] > 1 else 0]
        mask = mask[:, : queries if mask.shape[1] > 1 else 1, : keys if mask.shape[2] > 1 else 1]
        if mask.dtype == torch.bool:
            bias = bias.masked_fill(~mask, -torch.inf)
        else:
            bias = bias + mask
    return bias


def never_seen(problem: Problem, q: Tensor, k: Tensor) -> Tensor:
    """(batch, seqlen_k, heads_k): keys that no row of no head sees."""
    hidden = torch.ones(k.shape[:3], dtype=torch.bool)
    for part in parts(problem, q, k):
        seen = part.bias.isfinite().any(1).unflatten(0, (k.shape[2], -1)).any(1)
        hidden[part.batch, part.keys] = ~seen.T
    return hidden


def attention(
    problem: Problem,
    inputs: Named,
    dtype: torch.dtype = torch.float64,
    *,
    round_scores: bool = False,
) -> dict[str, Tensor]:
    """All outputs, and the gradients of the inputs, computed in the dtype.

    Args:
        problem: scale, masks and lengths.
        inputs: some of INPUTS, at least q, k and v; those that are absent are zero. Shapes
            (batch, seqlen, heads, head_dim), row vectors (batch, heads, seqlen_q).
        dtype: of the computation.
        round_scores: to float32, as the kernels do. It matters where a mask is so large that
            products Q Kᵀ beside it are lost.

    Returns:
        out, tout, lse, mu, beta, delta, grad_q, grad_k, grad_v, grad_tq, grad_tk, grad_tv. Rows
        that belong to no sequence are 0. Also beta_terms, delta_terms, grad_q_terms, …: the
        magnitude of the terms that are summed to each result. If the terms of P, Tc, dT and dS have
        relative errors e, then beta and delta have errors of at most e times this, and the
        gradients of about that. tout_terms is the same for relative errors of P∘(T − c), mu_terms
        for P∘(T − c) and T, and beta_products and delta_products for O and tO.
    """
    x = {name: tensor.to(dtype) for name, tensor in inputs.items()}
    q, k, v = x["q"], x["k"], x["v"]
    for tangent, primal in (("tq", q), ("tk", k), ("tv", v)):
        x.setdefault(tangent, torch.zeros_like(primal))
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    row = q.new_zeros(q.shape[0], q.shape[2], q.shape[1])
    for name in ("grad_out", "grad_tout"):
        x.setdefault(name, torch.zeros_like(out))
    for name in ("grad_lse", "grad_mu"):
        x.setdefault(name, torch.zeros_like(row))

    results = {name: torch.zeros_like(out) for name in ("out", "tout", "tout_terms")}
    results |= {name: torch.zeros_like(row) for name in _ROW_RESULTS}
    results |= {f"grad_{name}": torch.zeros_like(x[name]) for name in INPUTS[:6]}
    results |= {f"grad_{name}_terms": torch.zeros_like(x[name]) for name in INPUTS[:6]}
    for part in parts(problem, q, k):
        heads_first = {name: _part_of(name, x[name], part) for name in INPUTS}
        of_part = _one_sequence(
            heads_first, part.bias.to(dtype), problem.softmax_scale, round_scores
        )
        for name, result in of_part.items():
            _part_of(name, results[name], part).copy_(result)
    return results


def _part_of(name: str, x: Tensor, part: Part) -> Tensor:
    """A view (heads, rows, columns) of a tensor, (heads, rows) of a row vector."""
    if name in (*ROW_VECTORS, *_ROW_RESULTS):
        return x[part.batch, :, part.queries]
    along_keys = name.removeprefix("grad_").removesuffix("_terms") in ("k", "v", "tk", "tv")
    return x[part.batch, part.keys if along_keys else part.queries].transpose(0, 1)


def _one_sequence(x: Named, bias: Tensor, s: float, round_scores: bool) -> dict[str, Tensor]:
    group = x["q"].shape[0] // x["k"].shape[0]
    q, tq, g_out, g_tout = x["q"], x["tq"], x["grad_out"], x["grad_tout"]
    k, v, tk, tv = (x[n].repeat_interleave(group, dim=0) for n in ("k", "v", "tk", "tv"))

    scores = s * q @ k.mT + bias
    if round_scores:
        scores = scores.float().to(scores.dtype)
    maximum = scores.new_zeros(scores.shape[:-1])
    if scores.shape[-1] > 0:
        maximum = scores.amax(-1)
    alive = maximum > -torch.inf if scores.shape[-1] > 0 else torch.zeros_like(maximum).bool()
    maximum = maximum.masked_fill(~alive, 0)
    weights = (scores - maximum[..., None]).exp()
    total = weights.sum(-1)
    p = weights / total.masked_fill(~alive, 1)[..., None]
    lse = maximum + total.log()

    t = s * (tq @ k.mT + q @ tk.mT)
    mu = (p * t).sum(-1)
    tc = t - mu[..., None]
    out = p @ v
    tout = (p * tc) @ v + p @ tv

    # A kernel rounds P∘(T − c), where c is the mean of T over visible keys, and subtracts the row
    # sum of the rounded products times O.
    visible = bias.isfinite()
    c = t.where(visible, 0).sum(-1) / visible.sum(-1).clamp(min=1)
    weighted = p * (t - c[..., None])
    spread = _spread(weighted, v).square() + weighted.square().sum(-1)[..., None] * out.square()
    spread = spread - 2 * out * (weighted.square() @ v)  # Σ_j weighted_j² (V_j − O)²

    beta = (g_tout * out).sum(-1) - x["grad_mu"]
    delta = (g_out * out + g_tout * tout).sum(-1) - x["grad_lse"]
    b = g_tout @ v.mT - beta[..., None]
    dt = p * b
    ds = p * (g_out @ v.mT + g_tout @ tv.mT + b * tc - delta[..., None])

    # The relative error of exp(S − lse) is the absolute error of S − lse.
    exponents = 1 + abs(s) * _size(q, k) + bias.where(p > 0, 0).abs()
    exponents = exponents + lse.where(alive, 0).abs()[..., None]
    b_terms = _size(g_tout, v) + beta.abs()[..., None]
    t_terms = abs(s) * (_size(tq, k) + _size(q, tk)) + mu.abs()[..., None]
    x_terms = _size(g_out, v) + _size(g_tout, tv) + delta.abs()[..., None]
    x_terms = x_terms + b_terms * tc.abs() + b.abs() * t_terms
    dt_terms = dt.abs() * exponents + p * b_terms
    ds_terms = ds.abs() * exponents + p * x_terms
    p_terms = p * exponents
    ptc_terms = p_terms * tc.abs() + p * t_terms

    def of_group(x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, group)).sum(1)

    return {
        "out": out,
        "tout": tout,
        "tout_terms": spread.clamp(min=0).sqrt(),
        "lse": lse,
        "mu": mu,
        "beta": beta,
        "delta": delta,
        "mu_terms": mu.abs() + (weighted.abs() * exponents + p * t_terms).square().sum(-1).sqrt(),
        "beta_products": (g_tout * out).square().sum(-1).sqrt(),
        "delta_products": ((g_out * out).square() + (g_tout * tout).square()).sum(-1).sqrt(),
        "beta_terms": dt_terms.sum(-1),
        "delta_terms": ds_terms.sum(-1),
        "grad_q_terms": abs(s) * (_spread(ds_terms, k) + _spread(dt_terms, tk)),
        "grad_k_terms": of_group(abs(s) * (_spread(ds_terms.mT, q) + _spread(dt_terms.mT, tq))),
        "grad_v_terms": of_group(_spread(p_terms.mT, g_out) + _spread(ptc_terms.mT, g_tout)),
        "grad_tv_terms": of_group(_spread(p_terms.mT, g_tout)),
        "grad_tq_terms": abs(s) * _spread(dt_terms, k),
        "grad_tk_terms": of_group(abs(s) * _spread(dt_terms.mT, q)),
        "grad_q": s * (ds @ k + dt @ tk),
        "grad_k": of_group(s * (ds.mT @ q + dt.mT @ tq)),
        "grad_v": of_group(p.mT @ g_out + (p * tc).mT @ g_tout),
        "grad_tq": s * dt @ k,
        "grad_tk": of_group(s * dt.mT @ q),
        "grad_tv": of_group(p.mT @ g_tout),
    }


def _size(a: Tensor, b: Tensor) -> Tensor:
    """The magnitude of the product a bᵀ and of its partial sums, if their signs are random."""
    return (a @ b.mT).abs() + _spread(a, b.mT)


def _spread(a: Tensor, b: Tensor) -> Tensor:
    """The magnitude of the product a b if the signs of its terms are random."""
    return (a.square() @ b.square()).sqrt()
