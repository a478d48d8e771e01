// Forward; with kJvp the forward JVP, in the same pass over the keys.
//
//     S = s Q Kᵀ     P = exp(S − lse)     lse = logsumexp(S)     O = P V
//     T = s (tQ Kᵀ + Q tKᵀ)               mu = rowsum(P∘T)       tO = (P∘T) V − mu O + P tV
//
// Tiles: Q and tQ are Rows x HeadDim and stay in shared memory; a warp computes 16 rows. K, tK, V
// and tV are Keys x HeadDim and stream: V is loaded while K is used, the next K while V is used.
#pragma once

#include "common/softmax.cuh"
#include "sm80/tile.cuh"

namespace jvp_attn {

template <class Element, int HeadDim, int Rows, int Keys, bool kJvp, bool kMasked>
struct Forward {
    using RowTile = Tile<Rows, HeadDim>;
    using KeyTile = Tile<Keys, HeadDim>;

    static constexpr int kThreads = Rows / 16 * 32;
    static constexpr int kSharedBytes = (kJvp ? 2 : 1) * (RowTile::kBytes + 2 * KeyTile::kBytes);

    static int64_t blocks(const AttentionParams& p) { return RowBlock<Rows>::count(p); }

    DEVICE static void run(const AttentionParams& p) {
        const RowBlock<Rows> block(p);
        if (block.is_empty()) return;

        const GmemView k = block.keys_of(p.k, p.head_dim);
        const GmemView v = block.keys_of(p.v, p.head_dim_v);
        const GmemView tk = block.keys_of(p.tk, p.head_dim);
        const GmemView tv = block.keys_of(p.tv, p.head_dim_v);
        const bool has_tq = kJvp && p.tq.data, has_tk = kJvp && p.tk.data;
        const bool has_tv = kJvp && p.tv.data, has_t = has_tq || has_tk;

        const SharedAddress memory = shared_memory();
        const KeyTile k_tile{memory}, v_tile{memory + KeyTile::kBytes};
        const RowTile q_tile{memory + 2 * KeyTile::kBytes};
        const RowTile tq_tile{q_tile.base + RowTile::kBytes};
        const KeyTile tk_tile{tq_tile.base + RowTile::kBytes};
        const KeyTile tv_tile{tk_tile.base + KeyTile::kBytes};

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

        OnlineSoftmax softmax;
        TangentWeights tangent_weights;
        Accumulator<HeadDim> out, tout;

        if (key_end > 0) {
            load_tile<kThreads>(q_tile, block.rows_of(p.q, p.head_dim), block.first_row);
            if (has_tq)
                load_tile<kThreads>(tq_tile, block.rows_of(p.tq, p.head_dim), block.first_row);
            load_keys(0);
        }
#pragma unroll 1
        for (int first_key = 0; first_key < key_end; first_key += Keys) {
            copy_async_wait<0>();
            block_barrier();  // K has arrived, and all warps have used the last V
            load_values(first_key);

            // S = Q Kᵀ and T = tQ Kᵀ + Q tKᵀ
            Accumulator<Keys> scores, tangents;
            multiply_transposed_with_tangent<Element>(scores, tangents, q_tile, tq_tile, has_tq,
                                                      row, k_tile, tk_tile, has_tk);
            // mask S
            if (first_key + Keys > unmasked_key_end) {
                visible.apply(scores, scale, first_key);
                zero_hidden(tangents, scores);
            } else {
                scores.scale(scale);
            }

            // P = exp(S − max); P, rounded
            float rescaling[2];
            softmax.update(scores, 1, rescaling);
            Packed<Element, Keys> weights, weighted;
            round_weights(weights, scores);
            // Rescale O, tO and the sums of P∘T to the new maximum, which few tiles change.
            if (warp_any(rescaling[0] != 1 || rescaling[1] != 1)) {
                out.scale_rows(rescaling);
                tout.scale_rows(rescaling);
                tangent_weights.rescale(rescaling);
            }
            // P∘(T − c), rounded
            if (has_t) tangent_weights.set_reference(scores, tangents, scale);
            if (kJvp) tangent_weights.update(weighted, scores, tangents, scale);

            copy_async_wait<0>();
            block_barrier();  // V has arrived, and all warps have used K
            if (first_key + Keys < key_end) load_keys(first_key + Keys);

            // O += P V, and tO += P∘(T − c) V + P tV
            if (has_t)
                multiply<Element>(out, weights, tout, weighted, v_tile);
            else
                multiply<Element>(out, weights, v_tile);
            if (has_tv) multiply<Element>(tout, weights, tv_tile);
        }
        finish(p, block, block.first_row + row, softmax, tangent_weights, out, tout);
    }

private:
    // Normalises and centres; stores lse, lse_lo, mu, O, tO, out_lo and tout_lo.
    DEVICE static void finish(const AttentionParams& p, const RowBlock<Rows>& block, int first_row,
                              const OnlineSoftmax& softmax, const TangentWeights& tangent_weights,
                              Accumulator<HeadDim>& out, Accumulator<HeadDim>& tout) {
        float* const mu = block.statistic(p.mu);
        float normalisation[2], rounded_mean[2];
        softmax.finish(p, block, first_row, normalisation);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            rounded_mean[half] = tangent_weights.rounded_sum.at(half) * normalisation[half];
            const float mean = quad_sum(tangent_weights.exact_sum[half]) * normalisation[half];

            const int row = first_row + row_in_warp(half);
            if (kJvp && lane_index() % 4 == 0 && row < block.sequence.queries)
                global_store(mu + row, tangent_weights.reference[half] + mean);
        }
        out.scale_rows(normalisation);
        store_rows<Element>(block.rows_of(p.out, p.head_dim_v),
                            block.rows_of(p.out_lo, p.head_dim_v), first_row, out);
        if (!kJvp) return;
        tout.scale_rows(normalisation);
        tout.subtract_scaled_rows(rounded_mean, out);
        store_rows<Element>(block.rows_of(p.tout, p.head_dim_v),
                            block.rows_of(p.tout_lo, p.head_dim_v), first_row, tout);
    }
};

}  // namespace jvp_attn
