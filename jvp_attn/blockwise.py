"""Backend `blockwise`: the four maps as tiled torch operations, for every dtype and device.

The readable specification that the kernels must match. A block of query rows meets all the keys
that it may see, so softmax and row sums are those of the formulas, without a running maximum.
Memory beside the outputs is a few blocks of scores: linear in seqlen_k. Half precision is computed
in float32, under autocast as well. Absent tangents and cotangents are None and cost nothing.
Residuals are neither needed nor returned.

Query heads that share a key head are stacked as rows of one problem, so grouped heads need neither
copies of K and V nor a reduction of their gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from jvp_attn.maps import (
    AttentionOptions,
    Gradients,
    Outputs,
    TangentGradients,
    TangentOutputs,
)

X = TypeVar("X", Tensor, Tensor | None)  # an absent tensor stays absent
Map = TypeVar("Map", bound=Callable[..., Any])

# Scores in a block: on a CPU it should stay near the cache, a GPU wants more parallel work.
_CPU_BLOCK = 2**19
_GPU_BLOCK = 2**24
# Fewer rows than this starve the matrix products, however long the rows are.
_MIN_ROWS = 64


# ----------------------------------------------------------------------------
# The four maps


def _without_autocast(attention_map: Map) -> Map:
    """Autocast would round each product to half precision, in the middle of the map."""

    @wraps(attention_map)
    def in_full_precision(q: Tensor, *others: Any) -> Any:
        device = q.device.type
        if not torch.amp.is_autocast_available(device):
            return attention_map(q, *others)
        with torch.autocast(device, enabled=False):
            return attention_map(q, *others)

    return cast(Map, in_full_precision)


@_without_autocast
def forward(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Outputs:
    """O = P V and lse = logsumexp(S)."""
    out, lse = _new_out(q, v), _new_lse(q)
    for heads in _head_blocks(q, k):
        keys, values = heads.load_keys(k), heads.load_keys(v)
        for rows in heads.row_blocks(options.causal):
            queries = _times(rows.load(q), options.softmax_scale)
            p, row_lse = _softmax(rows, queries, keys)
            rows.store(out, _products((p, rows.seen(values))))
            rows.store_sums(lse, row_lse)
    return out, lse, None


@_without_autocast
def forward_tangent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None,
    tk: Tensor | None,
    tv: Tensor | None,
    options: AttentionOptions,
) -> TangentOutputs:
    """O, lse, tO = (P∘(T − mu)) V + P tV and mu = rowsum(P∘T), in one pass."""
    out, lse = _new_out(q, v), _new_lse(q)
    tout, mu = _new_zeros(out), _new_zeros(lse)
    for heads in _head_blocks(q, k):
        keys, values = heads.load_keys(k), heads.load_keys(v)
        tkeys, tvalues = heads.load_keys(tk), heads.load_keys(tv)
        for rows in heads.row_blocks(options.causal):
            queries = _times(rows.load(q), options.softmax_scale)
            tqueries = _times(rows.load(tq), options.softmax_scale)
            p, row_lse = _softmax(rows, queries, keys)
            rows.store(out, _products((p, rows.seen(values))))
            rows.store_sums(lse, row_lse)

            pt = _score_tangent(rows, queries, keys, tqueries, tkeys)
            if pt is not None:
                row_mu = (p * pt).sum(-1, keepdim=True)
                rows.store_sums(mu, row_mu)
                pt.sub_(row_mu).mul_(p)
            rows.store(tout, _products((pt, rows.seen(values)), (p, rows.seen(tvalues))))
    return out, lse, tout, mu, None, None


@_without_autocast
def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    _out_residual: Tensor | None,
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    options: AttentionOptions,
) -> Gradients:
    """The VJP of `forward`: that of `forward_tangent` where every tangent is absent."""
    gradients, _ = tangent_backward(
        *(q, k, v, None, None, None),
        *(out, lse, out, lse),  # tout and mu are not read where there is no tangent
        *(None, None),
        *(grad_out, grad_lse, None, None),
        options,
        (False, False, False),
    )
    return gradients


@_without_autocast
def tangent_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None,
    tk: Tensor | None,
    tv: Tensor | None,
    out: Tensor,
    lse: Tensor,
    tout: Tensor,
    mu: Tensor,
    _out_residual: Tensor | None,
    _tout_residual: Tensor | None,
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    grad_tout: Tensor | None,
    grad_mu: Tensor | None,
    options: AttentionOptions,
    needs_tangent_grads: tuple[bool, bool, bool],
) -> tuple[Gradients, TangentGradients]:
    """The VJP of `forward_tangent`. With gO, g_lse, gT, g_mu the cotangents of O, lse, tO, mu:

        Tc = T − mu     A = gO Vᵀ + gT tVᵀ     Bc = gT Vᵀ − beta     X = A + Bc∘Tc
        beta = rowsum(P∘(gT Vᵀ)) − g_mu        delta = rowsum(P∘X) − g_lse
        Tbar = P∘Bc                            Sbar = P∘(X − delta)

        gq = s (Sbar K + Tbar tK)     gk = s (Sbarᵀ Q + Tbarᵀ tQ)     gv = Pᵀ gO + (P∘Tc)ᵀ gT
        gtq = s Tbar K                gtk = s Tbarᵀ Q                 gtv = Pᵀ gT

    beta and delta equal gT·O and gO·O + gT·tO, but as row sums they carry none of the rounding of
    a half-precision O and tO, which would leak mean(K) into gq. So would P = exp(S − lse), whose
    rows sum to 1 only as exactly as lse is rounded: P is computed anew.
    """
    scale = options.softmax_scale
    gq, gk, gv = _new_zeros(q), _new_zeros(k), _new_zeros(v)
    gtq, gtk, gtv = (
        _new_zeros(x) if needed else None
        for x, needed in zip((q, k, v), needs_tangent_grads, strict=True)
    )
    for heads in _head_blocks(q, k):
        keys, values = heads.load_keys(k), heads.load_keys(v)
        tkeys, tvalues = heads.load_keys(tk), heads.load_keys(tv)
        sum_gk, sum_gv = torch.zeros_like(keys), torch.zeros_like(values)
        sum_gtk = None if gtk is None else torch.zeros_like(keys)
        sum_gtv = None if gtv is None else torch.zeros_like(values)

        for rows in heads.row_blocks(options.causal):
            queries, tqueries = _times(rows.load(q), scale), _times(rows.load(tq), scale)
            g_out, g_tout = rows.load(grad_out), rows.load(grad_tout)
            g_lse, g_mu = rows.load_sums(grad_lse), rows.load_sums(grad_mu)
            p, _ = _softmax(rows, queries, keys)

            tc = _score_tangent(rows, queries, keys, tqueries, tkeys)
            if tc is not None:
                tc.sub_(rows.load_sums(mu))
            bc = rows.hide(_products((g_tout, rows.seen(values).mT)), 0)
            bc = _centred(p, bc, g_mu)
            x = rows.hide(
                _products((g_out, rows.seen(values).mT), (g_tout, _transposed(rows.seen(tvalues)))),
                0,
            )
            if bc is not None and tc is not None:
                x = bc * tc if x is None else x.addcmul_(bc, tc)
            x = _centred(p, x, g_lse)
            sbar, tbar, ptc = _times(x, p), _times(bc, p), _times(tc, p)

            rows.store(
                gq, _times(_products((sbar, rows.seen(keys)), (tbar, rows.seen(tkeys))), scale)
            )
            if gtq is not None:
                rows.store(gtq, _times(_products((tbar, rows.seen(keys))), scale))
            rows.add_products(sum_gk, (sbar, queries), (tbar, tqueries))
            rows.add_products(sum_gv, (p, g_out), (ptc, g_tout))
            rows.add_products(sum_gtk, (tbar, queries))
            rows.add_products(sum_gtv, (p, g_tout))

        for grad, total in ((gk, sum_gk), (gv, sum_gv), (gtk, sum_gtk), (gtv, sum_gtv)):
            heads.store_keys(grad, total)
    return (gq, gk, gv), (gtq, gtk, gtv)


# ----------------------------------------------------------------------------
# Scores of one block


def _softmax(rows: _RowBlock, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """P (problems, rows, seen keys) and lse (problems, rows, 1)."""
    scores = rows.hide(queries @ rows.seen(keys).mT, -torch.inf)
    p = torch.softmax(scores, -1)
    # The largest weight of a row is exp(max − lse).
    return p, scores.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log_()


def _score_tangent(
    rows: _RowBlock, queries: Tensor, keys: Tensor, tqueries: Tensor | None, tkeys: Tensor | None
) -> Tensor | None:
    """T = s (tQ Kᵀ + Q tKᵀ), 0 where a key is hidden; None where neither Q nor K has a tangent."""
    t = _products((tqueries, rows.seen(keys).mT), (queries, _transposed(rows.seen(tkeys))))
    return rows.hide(t, 0)


def _centred(p: Tensor, x: Tensor | None, cotangent: Tensor | None) -> Tensor | None:
    """Subtract rowsum(P∘x) from x and add a cotangent, in place."""
    if x is None:
        return None if cotangent is None else cotangent.expand_as(p)
    x.sub_((p * x).sum(-1, keepdim=True))
    return x if cotangent is None else x.add_(cotangent)


# ----------------------------------------------------------------------------
# Algebra in which None is zero


def _products(*pairs: tuple[Tensor | None, Tensor | None]) -> Tensor | None:
    """The sum of the matrix products of the pairs that have both factors."""
    total = None
    for a, b in pairs:
        if a is not None and b is not None:
            total = torch.bmm(a, b) if total is None else total.baddbmm_(a, b)
    return total


def _times(x: X, factor: Tensor | float) -> X:
    return None if x is None else x * factor


def _transposed(x: X) -> X:
    return None if x is None else x.mT


# ----------------------------------------------------------------------------
# Blocks


@dataclass(frozen=True)
class _HeadBlock:
    """Some batches and key heads: (batch, key head) pairs are independent problems."""

    batches: slice
    key_heads: slice
    group: int  # query heads per key head
    seqlen_q: int
    seqlen_k: int
    rows_per_block: int

    def load_keys(self, x: X) -> X:
        """(batch, seqlen_k, heads_k, dim) → (problems, seqlen_k, dim), at least float32."""
        if x is None:
            return None
        x = x[self.batches, :, self.key_heads].transpose(1, 2).flatten(0, 1)
        return x.to(_compute_dtype(x)).contiguous()

    def store_keys(self, target: Tensor | None, value: Tensor | None) -> None:
        if target is not None and value is not None:
            part = target[self.batches, :, self.key_heads].transpose(1, 2)
            part.copy_(value.view(part.shape))

    def row_blocks(self, causal: bool) -> Iterator[_RowBlock]:
        """Blocks of rows, each with the number of leading keys that its last row sees."""
        # The first rows may see no key: they keep what the outputs start with.
        first = max(self.seqlen_q - self.seqlen_k, 0) if causal else 0
        for start in range(first, self.seqlen_q, self.rows_per_block):
            stop = min(start + self.rows_per_block, self.seqlen_q)
            seen = stop + self.seqlen_k - self.seqlen_q if causal else self.seqlen_k
            yield _RowBlock(self, slice(start, stop), seen, causal)


@dataclass(frozen=True)
class _RowBlock:
    """Rows of one head block: the same rows of every query head that shares a key head."""

    heads: _HeadBlock
    rows: slice
    seen_keys: int
    causal: bool

    def seen(self, keys: X) -> X:
        return None if keys is None else keys[:, : self.seen_keys]

    def load(self, x: X) -> X:
        """(batch, seqlen_q, heads, dim) → (problems, group · rows, dim), at least float32."""
        if x is None:
            return None
        x = self._part(x)
        return x.reshape(-1, x.shape[2] * x.shape[3], x.shape[4]).to(_compute_dtype(x))

    def store(self, target: Tensor | None, value: Tensor | None) -> None:
        if target is not None and value is not None:
            part = self._part(target)
            part.copy_(value.view(part.shape))

    def load_sums(self, x: X) -> X:
        """(batch, heads, seqlen_q) → (problems, group · rows, 1)."""
        if x is None:
            return None
        part = self._sums_part(x)
        return part.reshape(-1, part.shape[2] * part.shape[3], 1)

    def store_sums(self, target: Tensor, value: Tensor) -> None:
        part = self._sums_part(target)
        part.copy_(value.view(part.shape))

    def add_products(
        self, total: Tensor | None, *pairs: tuple[Tensor | None, Tensor | None]
    ) -> None:
        """Add aᵀ b, for pairs that have both, to the seen keys of (problems, seqlen_k, dim)."""
        if total is None:
            return
        for a, b in pairs:
            if a is not None and b is not None:
                self.seen(total).baddbmm_(a.mT, b)

    def hide(self, x: X, value: float) -> X:
        """Fill, in place, what no row may see."""
        if x is None or not self.causal:
            return x
        length = self.rows.stop - self.rows.start
        offset = self.heads.seqlen_k - self.heads.seqlen_q
        if self.rows.start + offset + 1 >= self.seen_keys:
            return x  # the first row already sees every key of the block
        row = torch.arange(self.rows.start, self.rows.stop, device=x.device)
        column = torch.arange(self.seen_keys, device=x.device)
        hidden = column > (row + offset)[:, None]
        x.view(-1, length, self.seen_keys).masked_fill_(hidden, value)
        return x

    def _part(self, x: Tensor) -> Tensor:
        """(batch, seqlen_q, heads, dim) → view (batches, key heads, group, rows, dim)."""
        x = x.unflatten(2, (-1, self.heads.group))
        return x[self.heads.batches, self.rows, self.heads.key_heads].permute(0, 2, 3, 1, 4)

    def _sums_part(self, x: Tensor) -> Tensor:
        """(batch, heads, seqlen_q) → view (batches, key heads, group, rows)."""
        x = x.unflatten(1, (-1, self.heads.group))
        return x[self.heads.batches, self.heads.key_heads, :, self.rows]


def _head_blocks(q: Tensor, k: Tensor) -> Iterator[_HeadBlock]:
    """Cut the problems so that a block of scores has about the size the device likes."""
    batch, seqlen_q, heads, _ = q.shape
    _, seqlen_k, heads_k, _ = k.shape
    if q.numel() == 0 or k.numel() == 0:
        return
    group = heads // heads_k
    budget = _CPU_BLOCK if q.device.type == "cpu" else _GPU_BLOCK
    rows_of_group = max(budget // seqlen_k, _MIN_ROWS)
    rows_per_block = min(max(rows_of_group // group, 1), seqlen_q)
    problems = max(budget // (group * rows_per_block * seqlen_k), 1)
    # Whole batches where one batch fits, else some of the heads of one batch.
    heads_per_block = min(problems, heads_k)
    batches_per_block = max(problems // heads_k, 1)
    for b in range(0, batch, batches_per_block):
        for h in range(0, heads_k, heads_per_block):
            yield _HeadBlock(
                slice(b, min(b + batches_per_block, batch)),
                slice(h, min(h + heads_per_block, heads_k)),
                group,
                seqlen_q,
                seqlen_k,
                rows_per_block,
            )


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _new_out(q: Tensor, v: Tensor) -> Tensor:
    return q.new_zeros(*q.shape[:3], v.shape[3])


def _new_lse(q: Tensor) -> Tensor:
    batch, seqlen_q, heads, _ = q.shape
    return q.new_full((batch, heads, seqlen_q), -torch.inf, dtype=_compute_dtype(q))


def _new_zeros(x: Tensor) -> Tensor:
    return torch.zeros_like(x, memory_format=torch.contiguous_format)
