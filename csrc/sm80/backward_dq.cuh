// Backward: dQ; with kJvp also through tO, and dtQ.
//
//     P = exp(S − lse)      Tc = T − mu      Bc = dtO Vᵀ − beta
//     X = dO Vᵀ + dtO tVᵀ + Bc∘Tc − delta
//     dS = P∘X              dT = P∘Bc
//     dQ = s (dS K + dT tK)                  dtQ = s dT K
//
// Tiles: Q, dO, tQ and dtO are Rows x HeadDim and stay in shared memory; a warp computes 16 rows.
// K, tK, V and tV are Keys x HeadDim and stream. beta and delta come from preprocess.cuh; this
// kernel corrects them for backward_dkv.cuh.
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
        const bool has_dout = p.grad_out.data, has_dtout = kJvp && p.grad_tout.data;
        const bool has_tv = has_dtout && p.tv.data;

        const SharedAddress memory = shared_memory();
        const RowTile q_tile{memory}, dout_tile{memory + RowTile::kBytes};
        const KeyTile k_tile{dout_tile.base + RowTile::kBytes};
        const KeyTile v_tile{k_tile.base + KeyTile::kBytes};
        const RowTile tq_tile{v_tile.base + KeyTile::kBytes};
        const RowTile dtout_tile{tq_tile.base + RowTile::kBytes};
        const KeyTile tk_tile{dtout_tile.base + RowTile::kBytes};
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

        const int key_end = block.key_end();
        const int unmasked_key_end = kMasked ? 0 : block.unmasked_key_end();
        const int row = 16 * warp_index();  // the first row of the warp, within the block
        const VisibleKeys<Element, kMasked> visible(p, block.sequence, block.head,
                                                    block.first_row + row);
        const float scale = p.softmax_scale;
        const Statistics rows(p, block, block.first_row + row);

        Accumulator<HeadDim> grad_q, grad_tq;
        DsRowSums ds_sums, dt_sums;

        if (key_end > 0) {
            load_rows(q_tile, p.q, p.head_dim);
            if (has_dout) load_rows(dout_tile, p.grad_out, p.head_dim_v);
            if (has_tq) load_rows(tq_tile, p.tq, p.head_dim);
            if (has_dtout) load_rows(dtout_tile, p.grad_tout, p.head_dim_v);
            load_keys(0);
            load_values(0);
        }
#pragma unroll 1
        for (int first_key = 0; first_key < key_end; first_key += Keys) {
            copy_async_wait<0>();
            block_barrier();  // K and V have arrived

            // S = Q Kᵀ and T = tQ Kᵀ + Q tKᵀ; mask S; P = exp(S − lse)
            Accumulator<Keys> scores, tangents;
            multiply_transposed_with_tangent<Element>(scores, tangents, q_tile, tq_tile, has_tq,
                                                      row, k_tile, tk_tile, has_tk);
            const bool hides_keys = first_key + Keys > unmasked_key_end;
            if (hides_keys) {
                visible.apply(scores, scale, first_key);
                zero_hidden(tangents, scores);
            } else {
                scores.scale(scale);
            }
            subtract_lse(scores, 1, rows.lse.subtrahend, rows.lse.centres, [&](int half) {
                return load_lse_lo(p, block, block.first_row + row + row_in_warp(half));
            });
            scores.exp2();
            const Accumulator<Keys>& weights = scores;

            // x = Bc; dT = P∘Bc
            Accumulator<Keys> x;
            Packed<Element, Keys> ds, dt;
            if (has_dtout) multiply_transposed<Element>(x, dtout_tile, row, v_tile);
            if (kJvp) {
                x.subtract_from_rows(rows.beta);
                if (hides_keys) x.zero_unweighted(weights);
                dt_sums.add_product(dt, weights, x);
                // x = Bc∘Tc
#pragma unroll
                for (int i = 0; i < x.kBlocks; ++i)
#pragma unroll
                    for (int e = 0; e < 4; ++e)
                        x.value[i][e] *= tangents.value[i][e] * scale - rows.mu[e / 2];
            }
            // x = X; dS = P∘X
            if (has_dout) multiply_transposed<Element>(x, dout_tile, row, v_tile);
            if (has_tv) multiply_transposed<Element>(x, dtout_tile, row, tv_tile);
            x.subtract_from_rows(rows.delta);
            if (hides_keys) x.zero_unweighted(weights);
            ds_sums.add_product(ds, weights, x);

            block_barrier();  // all warps have used V
            if (first_key + Keys < key_end) load_values(first_key + Keys);
            // dQ += dS K + dT tK, and dtQ += dT K
            add_products(grad_q, grad_tq, ds, dt, k_tile, tk_tile, has_tk);
            block_barrier();  // all warps have used K
            if (first_key + Keys < key_end) load_keys(first_key + Keys);
        }

        rows.correct_delta(block, p.delta, rows.delta, ds_sums, rows.grad_lse);
        if (kJvp) rows.correct_delta(block, p.beta, rows.beta, dt_sums, rows.grad_mu);

        // Correct the bias of the row sums. In exact arithmetic a row of dS sums to dlse and a row
        // of dT to dmu. Rounded rows do not, and the mean of K and tK would leak into the
        // gradients. The excess is subtracted from the visible keys of the first tile that has any.
        bool corrected[2] = {rows.lse.sees_no_key(0), rows.lse.sees_no_key(1)};
#pragma unroll 1
        for (int first_key = 0; first_key < key_end; first_key += Keys) {
            load_keys(first_key);
            copy_async_wait<0>();
            block_barrier();
            Packed<Element, Keys> ds, dt;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                Packed<Element, Keys> seen;
                const float count = visible_in_tile(seen, visible, half, first_key);
                const bool correct = !corrected[half] && count > 0;
                const float ds_excess = ds_sums.rounded(half) - rows.grad_lse[half];
                const float dt_excess = dt_sums.rounded(half) - rows.grad_mu[half];
                const float ds_share = correct ? -ds_excess / count : 0;
                const float dt_share = correct ? -dt_excess / count : 0;
#pragma unroll
                for (int i = 0; i < ds.kBlocks; ++i) {
                    const float low = seen.low(i, half), high = seen.high(i, half);
                    ds.set(i, half, ds_share * low, ds_share * high);
                    dt.set(i, half, dt_share * low, dt_share * high);
                }
                corrected[half] |= correct;
            }
            add_products(grad_q, grad_tq, ds, dt, k_tile, tk_tile, has_tk);
            if (!block_any(!corrected[0] || !corrected[1])) break;
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
    // Row sums of dS or dT, exact and rounded.
    struct DsRowSums {
        float exact_share[2] = {0, 0};  // of this thread's columns
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

    // The statistics of the two rows of a thread. To load the cotangents only in correct_delta, as
    // sm90/softmax.cuh does, spills 4 bytes at head dim 96, and at 64 with a mask.
    struct Statistics {
        int row[2];
        RowLse lse;
        float mu[2] = {0, 0}, beta[2] = {0, 0}, delta[2] = {0, 0};
        float grad_lse[2] = {0, 0}, grad_mu[2] = {0, 0};

        DEVICE Statistics(const AttentionParams& p, const RowBlock<Rows>& block, int first_row)
            : lse(p, block, first_row) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                row[half] = first_row + row_in_warp(half);
                if (row[half] >= block.sequence.queries) continue;
                const auto value = [&](const RowVector& x) {
                    return x.data ? global_load(block.statistic(x) + row[half]) : 0;
                };
                delta[half] = value(p.delta);
                grad_lse[half] = value(p.grad_lse);
                if (!kJvp) continue;
                mu[half] = value(p.mu);
                beta[half] = value(p.beta);
                grad_mu[half] = value(p.grad_mu);
            }
        }

        // Corrects delta or beta for the rounding of P in O and tO. In exact arithmetic the row
        // sums of dS and dT equal the cotangents of lse and mu; the difference is the error.
        DEVICE void correct_delta(const RowBlock<Rows>& block, const RowVector& target,
                                  const float (&value)[2], const DsRowSums& sums,
                                  const float (&cotangent)[2]) const {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float corrected = value[half] + sums.exact(half) - cotangent[half];
                if (lane_index() % 4 == 0 && !lse.sees_no_key(half))
                    global_store(block.statistic(target) + row[half], corrected);
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

    // Sets `seen` to 1 for visible keys of the tile and to 0 for hidden ones; returns how many are
    // visible.
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
