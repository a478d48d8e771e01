"""Backend `tiled`: the four primitives as tiled torch operations, for every dtype and device.

The readable specification that the kernels must match. A block of query rows is multiplied with all
keys that it may see, so softmax and row sums are those of the formulas, without a running maximum.
Memory beside the outputs is a few blocks of scores: linear in seqlen_k. Half precision is computed
in float32, under autocast as well. Absent tangents and cotangents are None and cost nothing.
Low-order parts are neither needed nor returned.

Masked and padded keys never affect a row, even if they are NaN. A key that a row sees makes the row
NaN if it is not finite.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jvp_attn.autocast import without_autocast
from jvp_attn.backends import meta
from jvp_attn.backends.tiles import HeadBlock, RowBlock, X, head_blocks
from jvp_attn.types import (
    AttentionOptions,
    Cotangents,
    Gradients,
    InputNeeds,
    Inputs,
    JvpCotangents,
    JvpOutputs,
    Needs,
    Outputs,
    Tangents,
)

# ----------------------------------------------------------------------------
# The four primitives


@without_autocast
def forward(inputs: Inputs, options: AttentionOptions) -> Outputs:
    """O = P V and lse = logsumexp(S)."""
    out, lse, _, lse_lo = outputs = meta.forward(inputs, options)
    for heads in head_blocks(inputs, options):
        keys = heads.load_keys(inputs.k)
        values, nonfinite = _finite_part(heads, heads.load_keys(inputs.v))
        for rows in heads.row_blocks():
            queries = _times(rows.load(inputs.q), options.softmax_scale)
            p, row_lse, row_lse_lo = _softmax(rows, queries, keys)
            row_out = _products((p, rows.seen(values)))
            rows.store(out, _propagate_nan(rows, row_out, nonfinite))
            rows.store_sums(lse, row_lse)
            rows.store_sums(lse_lo, row_lse_lo)
    return outputs


@without_autocast
def forward_jvp(inputs: Inputs, tangents: Tangents, options: AttentionOptions) -> JvpOutputs:
    """O, lse, tO = (P∘(T − mu)) V + P tV and mu = rowsum(P∘T), in one pass."""
    outputs = meta.forward_jvp(inputs, tangents, options)
    out, lse, tout, mu, _, _, lse_lo = outputs
    for heads in head_blocks(inputs, options):
        keys, tkeys = heads.load_keys(inputs.k), heads.load_keys(tangents.k)
        values, nonfinite = _finite_part(heads, heads.load_keys(inputs.v))
        tvalues, tnonfinite = _finite_part(heads, heads.load_keys(tangents.v))
        for rows in heads.row_blocks():
            queries = _times(rows.load(inputs.q), options.softmax_scale)
            tqueries = _times(rows.load(tangents.q), options.softmax_scale)
            p, row_lse, row_lse_lo = _softmax(rows, queries, keys)
            row_out = _products((p, rows.seen(values)))
            rows.store(out, _propagate_nan(rows, row_out, nonfinite))
            rows.store_sums(lse, row_lse)
            rows.store_sums(lse_lo, row_lse_lo)

            pt = _score_tangent(rows, queries, keys, tqueries, tkeys, tangents.mask)
            if pt is not None:
                row_mu = (p * pt).sum(-1, keepdim=True)
                rows.store_sums(mu, row_mu)
                pt.sub_(row_mu).mul_(p)
            row_tout = _products((pt, rows.seen(values)), (p, rows.seen(tvalues)))
            row_tout = _propagate_nan(rows, row_tout, nonfinite)
            rows.store(tout, _propagate_nan(rows, row_tout, tnonfinite))
    return outputs


@without_autocast
def backward(
    inputs: Inputs,
    outputs: Outputs,
    cotangents: Cotangents,
    needs: Needs,
    options: AttentionOptions,
) -> Gradients:
    """The VJP of `forward`: that of `forward_jvp` without tangents."""
    out, lse, out_lo, lse_lo = outputs
    # tout and mu are not read if there is no tangent.
    without_tangents = JvpOutputs(out, lse, out, lse, out_lo, None, lse_lo)
    gradients, _ = jvp_backward(
        *(inputs, Tangents(), without_tangents, JvpCotangents(*cotangents)),
        *((*needs, *InputNeeds()), options),
    )
    return gradients


@without_autocast
def jvp_backward(
    inputs: Inputs,
    tangents: Tangents,
    outputs: JvpOutputs,
    cotangents: JvpCotangents,
    needs: Needs,
    options: AttentionOptions,
) -> tuple[Gradients, Gradients]:
    """The VJP of `forward_jvp`. With dO, g_lse, dtO, g_mu the cotangents of O, lse, tO, mu:

        Tc = T − mu     A = dO Vᵀ + dtO tVᵀ     Bc = dtO Vᵀ − beta     X = A + Bc∘Tc
        beta = rowsum(P∘(dtO Vᵀ)) − g_mu        delta = rowsum(P∘X) − g_lse
        dT = P∘Bc                            dS = P∘(X − delta)

        dq = s (dS K + dT tK)     dk = s (dSᵀ Q + dTᵀ tQ)     dv = Pᵀ dO + (P∘Tc)ᵀ dtO
        dtq = s dT K                dtk = s dTᵀ Q                 dtv = Pᵀ dtO
        dmask = dS                  dtmask = dT

    beta and delta equal dtO·O and dO·O + dtO·tO. As row sums they are free of the rounding errors
    of half-precision O and tO, which would leak mean(K) into dq. P is recomputed by a softmax: rows
    of exp(S − lse) sum to 1 only up to the rounding of lse, which would leak mean(K) too.
    """
    scale = options.softmax_scale
    gradients, tangent_gradients = meta.jvp_backward(
        inputs, tangents, outputs, cotangents, needs, options
    )
    dq, dk, dv, dmask = gradients
    dtq, dtk, dtv, dtmask = tangent_gradients
    sum_dmask, sum_dtmask = _accumulator(dmask), _accumulator(dtmask)
    for heads in head_blocks(inputs, options):
        keys, tkeys = heads.load_keys(inputs.k), heads.load_keys(tangents.k)
        values, tvalues = heads.load_keys(inputs.v), heads.load_keys(tangents.v)
        finite_keys, _ = _finite_part(heads, keys)
        finite_tkeys, _ = _finite_part(heads, tkeys)
        sum_dk, sum_dtk = (None if g is None else torch.zeros_like(keys) for g in (dk, dtk))
        sum_dv, sum_dtv = (None if g is None else torch.zeros_like(values) for g in (dv, dtv))

        for rows in heads.row_blocks():
            queries = _times(rows.load(inputs.q), scale)
            tqueries = _times(rows.load(tangents.q), scale)
            p, row_lse, _ = _softmax(rows, queries, keys)
            g_out, g_tout = (
                _zero_fully_masked_rows(heads, rows.load(x), row_lse)
                for x in (cotangents.out, cotangents.tout)
            )
            g_lse, g_mu = rows.load_sums(cotangents.lse), rows.load_sums(cotangents.mu)

            tc = _score_tangent(rows, queries, keys, tqueries, tkeys, tangents.mask)
            if tc is not None:
                tc.sub_(rows.load_sums(outputs.mu))
            bc = rows.hide(_products((g_tout, rows.seen(values).mT)), 0)
            bc = _subtract_row_mean(p, bc, g_mu)
            x = rows.hide(
                _products((g_out, rows.seen(values).mT), (g_tout, _transposed(rows.seen(tvalues)))),
                0,
            )
            if bc is not None and tc is not None:
                x = bc * tc if x is None else x.addcmul_(bc, tc)
            x = _subtract_row_mean(p, x, g_lse)
            ds, dt, ptc = (_only_seen(rows, _times(y, p)) for y in (x, bc, tc))

            if dq is not None:
                row_gq = _products((ds, rows.seen(finite_keys)), (dt, rows.seen(finite_tkeys)))
                rows.store(dq, _times(row_gq, scale))
            if dtq is not None:
                rows.store(dtq, _times(_products((dt, rows.seen(finite_keys))), scale))
            queries, _ = _finite_part(heads, queries)
            tqueries, _ = _finite_part(heads, tqueries)
            rows.add_products(sum_dk, (ds, queries), (dt, tqueries))
            rows.add_products(sum_dv, (p, g_out), (ptc, g_tout))
            rows.add_products(sum_dtk, (dt, queries))
            rows.add_products(sum_dtv, (p, g_tout))
            rows.add_scores(sum_dmask, ds)
            rows.add_scores(sum_dtmask, dt)

        for grad, total in ((dk, sum_dk), (dv, sum_dv), (dtk, sum_dtk), (dtv, sum_dtv)):
            heads.store_keys(grad, total)
    for grad, total in ((dmask, sum_dmask), (dtmask, sum_dtmask)):
        if grad is not None and total is not None:
            grad.copy_(total)
    return gradients, tangent_gradients


# ----------------------------------------------------------------------------
# Scores of one block


def _softmax(rows: RowBlock, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """P (problems, rows, seen keys), lse and its low-order part (problems, rows, 1)."""
    mask = rows.heads.mask
    scores = rows.hide(rows.add_mask(queries @ rows.seen(keys).mT, mask), -torch.inf)
    p = torch.softmax(scores, -1)
    maximum = scores.amax(-1, keepdim=True)
    # The largest weight of a row is exp(max − lse).
    log_sum = p.amax(-1, keepdim=True).log_().neg_()
    lse = maximum + log_sum
    lse_lo = (maximum - lse).add_(log_sum)
    if mask is not None:
        sees_nothing = maximum == -torch.inf
        p.masked_fill_(sees_nothing, 0)
        lse.masked_fill_(sees_nothing, -torch.inf)
        lse_lo.masked_fill_(sees_nothing, 0)
    return _only_seen(rows, p), lse, lse_lo


def _score_tangent(
    rows: RowBlock,
    queries: Tensor,
    keys: Tensor,
    tqueries: Tensor | None,
    tkeys: Tensor | None,
    tmask: Tensor | None,
) -> Tensor | None:
    """T = s (tQ Kᵀ + Q tKᵀ) + tmask, 0 where a key is masked; None if all these tangents are."""
    t = _products((tqueries, rows.seen(keys).mT), (queries, _transposed(rows.seen(tkeys))))
    return rows.hide(rows.add_mask(t, tmask), 0)


def _subtract_row_mean(p: Tensor, x: Tensor | None, cotangent: Tensor | None) -> Tensor | None:
    """Subtract rowsum(P∘x) from x and add a cotangent, in place."""
    if x is None:
        return None if cotangent is None else cotangent.expand_as(p)
    x.sub_((p * x).sum(-1, keepdim=True))
    return x if cotangent is None else x.add_(cotangent)


# ----------------------------------------------------------------------------
# NaN and infinity propagate to the rows that see them and to no others, although 0 · NaN is NaN


def _only_seen(rows: RowBlock, weights: X) -> X:
    """Set the weights of masked keys to zero, in place, also in rows with NaN."""
    if weights is None or not rows.heads.hides_keys or _is_finite(weights.sum(-1)):
        return weights
    return rows.hide(weights, 0)


def _finite_part(heads: HeadBlock, x: X) -> tuple[X, Tensor | None]:
    """(problems, n, dim) with zeros for nonfinite vectors, and (problems, n, 1) that marks them.

    Returns (x, None) if every row sees all keys or all of x is finite.
    """
    if x is None or not heads.hides_keys or _is_finite(x):
        return x, None
    nonfinite = ~x.isfinite().all(-1, keepdim=True)
    return x.masked_fill(nonfinite, 0), nonfinite.to(x.dtype)


def _propagate_nan(rows: RowBlock, x: Tensor | None, nonfinite: Tensor | None) -> Tensor | None:
    """Set rows that see a nonfinite vector to NaN, in place."""
    if x is None or nonfinite is None:
        return x
    return x.masked_fill_(rows.count_seen(nonfinite) > 0, torch.nan)


def _zero_fully_masked_rows(heads: HeadBlock, x: X, lse: Tensor) -> X:
    """Cotangents, set to zero for rows that see no key, even if they are NaN."""
    if x is None or heads.mask is None:
        return x
    return x.masked_fill(lse == -torch.inf, 0)


def _is_finite(x: Tensor) -> bool:
    """Whether x is known to be finite. False on other devices than the CPU: checking would sync."""
    return x.device.type == "cpu" and bool(x.isfinite().all())


# ----------------------------------------------------------------------------
# Arithmetic in which None is zero


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


def _accumulator(gradient: Tensor | None) -> Tensor | None:
    """Zeros to sum a gradient in, at least float32."""
    if gradient is None:
        return None
    return torch.zeros_like(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32))
