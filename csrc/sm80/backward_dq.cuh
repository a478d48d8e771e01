// The gradient of Q; with kJvp, through the output's tangent as well, and that of tQ.
//
//     P = exp(S − lse)     Tc = T − mu     Bc = dtO Vᵀ − beta     X = dO Vᵀ + dtO tVᵀ + Bc∘Tc −
//     delta dS = P∘X           dT = P∘Bc     dQ = s (dS K + dT tK)             gtQ = s dT K
//
// A block has some rows of one head, as in forward.cuh. beta and delta come from preprocess.cuh;
// backward_dkv.cuh gets them back sharpened.
#pragma once

#include "common/softmax.cuh"
#include "sm80/tile.cuh"

namespace jvp_attn {

template <class Element, int HeadDim, int Rows, int Keys, bool kJvp, bool kMasked>
struct BackwardDq {
    using RowTile = Tile<Rows, HeadDim>;
    using KeyTile = Tile<Keys, HeadDim>;

    static constexpr int kThreads = Rows / 16 * 32;
    static constexpr int kSharedBytes =
        (kJvp ? 4 : 2) * RowTile::kBytes + (kJvp ? 4 : 2) * KeyTile::kBytes;

    static int64_t blocks(const AttentionParams& p) { return RowBlock<Rows>::count(p); }

    DEVICE static void run(const AttentionParams& p) {
        const RowBlock<Rows> block(p);
        if (block.is_empty()) return;

        const GmemView k = block.keys_of(p.k, p.head_dim);
        const GmemView v = block.keys_of(p.v, p.head_dim_v);
        const GmemView tk = block.keys_of(p.tk, p.head_dim);
        const GmemView tv = block.keys_of(p.tv, p.head_dim_v);
        const bool has_tq = kJvp && p.tq.data, has_tk = kJvp && p.tk.data;
        const bool has_go = p.grad_out.data, has_gt = kJvp && p.grad_tout.data;
        const bool has_tv = has_gt && p.tv.data;

        const SharedAddress memory = shared_memory();
        const RowTile q_tile{memory}, go_tile{memory + RowTile::kBytes};
        const KeyTile k_tile{go_tile.base + RowTile::kBytes};
        const KeyTile v_tile{k_tile.base + KeyTile::kBytes};
        const RowTile tq_tile{v_tile.base + KeyTile::kBytes};
        const RowTile gt_tile{tq_tile.base + RowTile::kBytes};
        const KeyTile tk_tile{gt_tile.base + RowTile::kBytes};
        const KeyTile tv_tile{tk_tile.base + KeyTile::kBytes};

        const auto load_rows = [&](const RowTile& tile, const Tensor& x, int columns) {
            load_tile<kThreads>(tile, block.rows_of(x, columns), block.first_row);
        };
        const auto load_keys = [&](int first_key) {
            load_tile<kThreads>(k_tile, k, first_key);
            if (has_tk) load_tile<kThreads>(tk_tile, tk, first_key);
            copy_async_commit();
        };
        const auto load_values = [&](int first_key) {
            load_tile<kThreads>(v_tile, v, first_key);
            if (has_tv) load_tile<kThreads>(tv_tile, tv, first_key);
            copy_async_commit();
        };

        // Keys from `end` on are seen by no row of the block, those before `clear` by all.
        const int end = block.key_end();
        const int clear = kMasked ? 0 : block.unmasked_key_end();
        const int row = 16 * warp_index();  // within the block
        const VisibleKeys<Element, kMasked> visible(p, block.sequence, block.head,
                                                    block.first_row + row);
        const float scale = p.softmax_scale;
        const Statistics rows(p, block, block.first_row + row);

        Accumulator<HeadDim> grad_q, grad_tq;
        RowTotals ds_totals, dt_totals;

        if (end > 0) {
            load_rows(q_tile, p.q, p.head_dim);
            if (has_go) load_rows(go_tile, p.grad_out, p.head_dim_v);
            if (has_tq) load_rows(tq_tile, p.tq, p.head_dim);
            if (has_gt) load_rows(gt_tile, p.grad_tout, p.head_dim_v);
            load_keys(0);
            load_values(0);
        }
#pragma unroll 1
        for (int first_key = 0; first_key < end; first_key += Keys) {
            copy_async_wait<0>();
            block_barrier();  // K and V are here

            Accumulator<Keys> scores, tangents;
            multiply_transposed_with_tangent<Element>(scores, tangents, q_tile, tq_tile, has_tq,
                                                      row, k_tile, tk_tile, has_tk);
            scores.scale(scale * kLog2E);
            const bool hides_keys = first_key + Keys > clear;
            if (hides_keys) {
                visible.apply(scores, first_key);
                silence_hidden(tangents, scores);
            }
            exponentiate(scores, rows.log2_sum);
            const Accumulator<Keys>& weights = scores;

            // x becomes Bc, then dT is known; then Bc∘Tc, then X, then dS is known.
            Accumulator<Keys> x;
            Packed<Element, Keys> ds, dt;
            if (has_gt) multiply_transposed<Element>(x, gt_tile, row, v_tile);
            if (kJvp) {
                x.subtract_from_rows(rows.beta);
                if (hides_keys) x.silence_unweighted(weights);
                dt_totals.add_product(dt, weights, x);
#pragma unroll
                for (int i = 0; i < x.kBlocks; ++i)
#pragma unroll
                    for (int e = 0; e < 4; ++e)
                        x.value[i][e] *= tangents.value[i][e] * scale - rows.mu[e / 2];
            }
            if (has_go) multiply_transposed<Element>(x, go_tile, row, v_tile);
            if (has_tv) multiply_transposed<Element>(x, gt_tile, row, tv_tile);
            x.subtract_from_rows(rows.delta);
            if (hides_keys) x.silence_unweighted(weights);
            ds_totals.add_product(ds, weights, x);

            block_barrier();  // no warp needs V any more
            if (first_key + Keys < end) load_values(first_key + Keys);
            add_products(grad_q, grad_tq, ds, dt, k_tile, tk_tile, has_tk);
            block_barrier();  // no warp needs K any more
            if (first_key + Keys < end) load_keys(first_key + Keys);
        }

        rows.correct_delta(block, p.delta, rows.delta, ds_totals, rows.grad_lse);
        if (kJvp) rows.correct_delta(block, p.beta, rows.beta, dt_totals, rows.grad_mu);

        // Along a row dS sums to g_lse and dT to g_mu. Rounded they do not, and the mean of K
        // and tK would leak into the gradients. What is too much is taken back from keys that the
        // row sees: from all in the first tile where it sees any.
        bool balanced[2] = {rows.sees_no_key(0), rows.sees_no_key(1)};
#pragma unroll 1
        for (int first_key = 0; first_key < end; first_key += Keys) {
            load_keys(first_key);
            copy_async_wait<0>();
            block_barrier();
            Packed<Element, Keys> ds, dt;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                Packed<Element, Keys> seen;
                const float count = visible_in_tile(seen, visible, half, first_key);
                const bool balance = !balanced[half] && count > 0;
                const float ds_excess = ds_totals.rounded(half) - rows.grad_lse[half];
                const float dt_excess = dt_totals.rounded(half) - rows.grad_mu[half];
                const float ds_share = balance ? -ds_excess / count : 0;
                const float dt_share = balance ? -dt_excess / count : 0;
#pragma unroll
                for (int i = 0; i < ds.kBlocks; ++i) {
                    const float low = seen.low(i, half), high = seen.high(i, half);
                    ds.set(i, half, ds_share * low, ds_share * high);
                    dt.set(i, half, dt_share * low, dt_share * high);
                }
                balanced[half] |= balance;
            }
            add_products(grad_q, grad_tq, ds, dt, k_tile, tk_tile, has_tk);
            if (!block_any(!balanced[0] || !balanced[1])) break;
        }

        const auto store = [&](const Tensor& target, Accumulator<HeadDim>& rows_of_target) {
            rows_of_target.scale(scale);
            store_rows<Element>(block.rows_of(target, p.head_dim), GmemView{},
                                block.first_row + row, rows_of_target);
        };
        store(p.grad_q, grad_q);
        if (kJvp && p.grad_tq.data) store(p.grad_tq, grad_tq);
    }

private:
    // What the rows of dS and dT sum to, before and after rounding.
    struct RowTotals {
        float exact_share[2] = {0, 0};  // of this thread
        RowSums rounded_sums;

        DEVICE float exact(int half) const { return quad_sum(exact_share[half]); }
        DEVICE float rounded(int half) const { return rounded_sums.at(half); }

        DEVICE void add_product(Packed<Element, Keys>& product, const Accumulator<Keys>& weights,
                                const Accumulator<Keys>& x) {
#pragma unroll
            for (int i = 0; i < x.kBlocks; ++i)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float low = weights.at(i, half, 0) * x.at(i, half, 0);
                    const float high = weights.at(i, half, 1) * x.at(i, half, 1);
                    product.set(i, half, low, high);
                    exact_share[half] += low + high;
                }
            rounded_sums.add(product);
        }
    };

    // What is known beforehand of the two rows of a thread. To load cotangents only when rows are
    // sharpened, as ../sm90/backward_rows.cuh does, spills: 4 bytes at head dim 96, and masked
    // at 64.
    struct Statistics {
        int row[2];
        float log2_sum[2] = {kInfinity, kInfinity};
        float mu[2] = {0, 0}, beta[2] = {0, 0}, delta[2] = {0, 0};
        float grad_lse[2] = {0, 0}, grad_mu[2] = {0, 0};

        DEVICE Statistics(const AttentionParams& p, const RowBlock<Rows>& block, int first_row) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                row[half] = first_row + row_in_warp(half);
                if (row[half] >= block.sequence.queries) continue;
                const auto value = [&](const RowVector& x) {
                    return x.data ? global_load(block.statistic(x) + row[half]) : 0;
                };
                log2_sum[half] = log2_of_sum(value(p.lse));
                delta[half] = value(p.delta);
                grad_lse[half] = value(p.grad_lse);
                if (!kJvp) continue;
                mu[half] = value(p.mu);
                beta[half] = value(p.beta);
                grad_mu[half] = value(p.grad_mu);
            }
        }

        DEVICE bool sees_no_key(int half) const { return log2_sum[half] == kInfinity; }

        // delta and beta carry the rounding of P inside O and tO. Here the rows of dS and dT
        // tell by how much: they would sum to the cotangents of lse and mu.
        DEVICE void correct_delta(const RowBlock<Rows>& block, const RowVector& target,
                                  const float (&value)[2], const RowTotals& totals,
                                  const float (&cotangent)[2]) const {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float sharp = value[half] + totals.exact(half) - cotangent[half];
                if (lane_index() % 4 == 0 && !sees_no_key(half))
                    global_store(block.statistic(target) + row[half], sharp);
            }
        }
    };

    DEVICE static void add_products(Accumulator<HeadDim>& grad_q, Accumulator<HeadDim>& grad_tq,
                                    const Packed<Element, Keys>& ds,
                                    const Packed<Element, Keys>& dt, const KeyTile& k_tile,
                                    const KeyTile& tk_tile, bool has_tk) {
        if (kJvp)
            multiply<Element>(grad_q, ds, grad_tq, dt, k_tile);
        else
            multiply<Element>(grad_q, ds, k_tile);
        if (has_tk) multiply<Element>(grad_q, dt, tk_tile);
    }

    // 1 for each key of the tile that a row sees, else 0; returns how many there are.
    DEVICE static float visible_in_tile(Packed<Element, Keys>& seen,
                                        const VisibleKeys<Element, kMasked>& visible, int half,
                                        int first_key) {
        float count = 0;
#pragma unroll
        for (int i = 0; i < seen.kBlocks; ++i) {
            const int key = first_key + column_of(i, 0);
            const float low = visible.bias(half, key) == -kInfinity ? 0 : 1;
            const float high = visible.bias(half, key + 1) == -kInfinity ? 0 : 1;
            seen.set(i, half, low, high);
            count += low + high;
        }
        return quad_sum(count);
    }
};

}  // namespace jvp_attn
