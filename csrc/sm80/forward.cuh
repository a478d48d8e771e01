// Forward, and forward with tangent in the same pass over the keys.
//
//     O = P V      lse = logsumexp(S)         T  = s (tQ Kᵀ + Q tKᵀ)
//     mu = rowsum(P∘T)                        tO = (P∘T) V − mu O + P tV
//
// A block has some rows of one head; each of its warps 16 of them. Tiles of keys stream by: while
// scores are computed from K the tile of V arrives, while V is used the next tile of K does.
#pragma once

#include "common/softmax.cuh"
#include "sm80/tile.cuh"

namespace jvp_attn {

template <class Element, int HeadDim, int Rows, int Keys, bool kTangent, bool kMasked>
struct Forward {
    using RowTile = Tile<Rows, HeadDim>;
    using KeyTile = Tile<Keys, HeadDim>;

    static constexpr int kThreads = Rows / 16 * 32;
    static constexpr int kSharedBytes =
        (kTangent ? 2 : 1) * (RowTile::kBytes + 2 * KeyTile::kBytes);

    static int64_t blocks(const AttentionParams& p) { return RowBlock<Rows>::count(p); }

    DEVICE static void run(const AttentionParams& p) {
        const RowBlock<Rows> block(p);
        if (block.is_empty()) return;

        const GmemView k = block.keys_of(p.k, p.head_dim);
        const GmemView v = block.keys_of(p.v, p.head_dim_v);
        const GmemView tk = block.keys_of(p.tk, p.head_dim);
        const GmemView tv = block.keys_of(p.tv, p.head_dim_v);
        const bool has_tq = kTangent && p.tq.data, has_tk = kTangent && p.tk.data;
        const bool has_tv = kTangent && p.tv.data, has_t = has_tq || has_tk;

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

        // Keys from `end` on are seen by no row of the block, those before `clear` by all.
        const int end = block.key_end();
        const int clear = kMasked ? 0 : block.unmasked_key_end();
        const int row = 16 * warp_index();  // within the block
        const VisibleKeys<Element, kMasked> visible(p, block.sequence, block.head,
                                                    block.first_row + row);
        const float scale = p.softmax_scale;

        OnlineSoftmax softmax;
        TangentWeights tangent_weights;
        Accumulator<HeadDim> out, tout;

        if (end > 0) {
            load_tile<kThreads>(q_tile, block.rows_of(p.q, p.head_dim), block.first_row);
            if (has_tq)
                load_tile<kThreads>(tq_tile, block.rows_of(p.tq, p.head_dim), block.first_row);
            load_keys(0);
        }
#pragma unroll 1
        for (int first_key = 0; first_key < end; first_key += Keys) {
            copy_async_wait<0>();
            block_barrier();  // K is here, and no warp needs the last V any more
            load_values(first_key);

            Accumulator<Keys> scores, tangents;
            multiply_transposed_with_tangent<Element>(scores, tangents, q_tile, tq_tile, has_tq,
                                                      row, k_tile, tk_tile, has_tk);
            scores.scale(scale * kLog2E);
            if (first_key + Keys > clear) {
                visible.apply(scores, first_key);
                silence_hidden(tangents, scores);
            }
            if (has_t) tangent_weights.find_reference(scores, tangents, scale);

            float rescaling[2];
            softmax.update(scores, rescaling);
            Packed<Element, Keys> weights, weighted;
            round_weights(weights, scores);
            // The maximum settles soon: most tiles leave it as it is.
            if (warp_any(rescaling[0] != 1 || rescaling[1] != 1)) {
                out.scale_rows(rescaling);
                tout.scale_rows(rescaling);
                tangent_weights.rescale(rescaling);
            }
            if (kTangent) tangent_weights.update(weighted, scores, tangents, scale);

            copy_async_wait<0>();
            block_barrier();  // V is here, and no warp needs K any more
            if (first_key + Keys < end) load_keys(first_key + Keys);

            if (has_t)
                multiply<Element>(out, weights, tout, weighted, v_tile);
            else
                multiply<Element>(out, weights, v_tile);
            if (has_tv) multiply<Element>(tout, weights, tv_tile);
        }
        finish(p, block, block.first_row + row, softmax, tangent_weights, out, tout);
    }

private:
    DEVICE static void finish(const AttentionParams& p, const RowBlock<Rows>& block, int first_row,
                              const OnlineSoftmax& softmax, const TangentWeights& tangent_weights,
                              Accumulator<HeadDim>& out, Accumulator<HeadDim>& tout) {
        float* const lse = block.statistic(p.lse);
        float* const mu = block.statistic(p.mu);
        float normalisation[2], rounded_mean[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float sum = quad_sum(softmax.sum[half]);
            const bool sees_no_key = sum == 0;
            normalisation[half] = sees_no_key ? 0 : 1 / sum;
            rounded_mean[half] = tangent_weights.rounded_sum.at(half) * normalisation[half];
            const float mean = quad_sum(tangent_weights.exact_sum[half]) * normalisation[half];

            const int row = first_row + row_in_warp(half);
            if (lane_index() % 4 == 0 && row < block.sequence.queries) {
                global_store(lse + row,
                             sees_no_key ? -kInfinity : (softmax.max[half] + log2f(sum)) * kLn2);
                if (kTangent) global_store(mu + row, tangent_weights.reference[half] + mean);
            }
        }
        out.scale_rows(normalisation);
        store_rows<Element>(block.rows_of(p.out, p.head_dim_v),
                            block.rows_of(p.out_lo, p.head_dim_v), first_row, out);
        if (!kTangent) return;
        tout.scale_rows(normalisation);
#pragma unroll
        for (int i = 0; i < tout.kBlocks; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e) tout.value[i][e] -= rounded_mean[e / 2] * out.value[i][e];
        store_rows<Element>(block.rows_of(p.tout, p.head_dim_v),
                            block.rows_of(p.tout_lo, p.head_dim_v), first_row, tout);
    }
};

}  // namespace jvp_attn
