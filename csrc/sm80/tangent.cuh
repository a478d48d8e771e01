// Tangent only: tO of an output that is known, with its lse. It computes 5 products, where the
// forward JVP computes 6, and has one accumulator of HeadDim columns, so that head_dim 256 fits.
//
//     S = s Q Kᵀ            P = exp(S − lse)      T = s (tQ Kᵀ + Q tKᵀ)
//     mu = rowsum(P∘T)      tO = (P∘T) V − mu O + P tV
//
// Tiles and loads are those of forward.cuh.
#pragma once

#include "common/softmax.cuh"
#include "sm80/tile.cuh"

namespace jvp_attn {

template <class Element, int HeadDim, int Rows, int Keys, bool kMasked>
struct TangentOnly {
    using RowTile = Tile<Rows, HeadDim>;
    using KeyTile = Tile<Keys, HeadDim>;

    static constexpr int kThreads = Rows / 16 * 32;
    static constexpr int kSharedBytes = 2 * RowTile::kBytes + 4 * KeyTile::kBytes;

    static int64_t blocks(const AttentionParams& p) { return RowBlock<Rows>::count(p); }

    DEVICE static void run(const AttentionParams& p) {
        const RowBlock<Rows> block(p);
        if (block.is_empty()) return;

        const GmemView k = block.keys_of(p.k, p.head_dim);
        const GmemView v = block.keys_of(p.v, p.head_dim_v);
        const GmemView tk = block.keys_of(p.tk, p.head_dim);
        const GmemView tv = block.keys_of(p.tv, p.head_dim_v);
        const bool has_tq = p.tq.data, has_tk = p.tk.data, has_tv = p.tv.data;
        const bool has_t = has_tq || has_tk;

        const SharedAddress memory = shared_memory();
        const RowTile q_tile{memory}, tq_tile{memory + RowTile::kBytes};
        const KeyTile k_tile{tq_tile.base + RowTile::kBytes};
        const KeyTile tk_tile{k_tile.base + KeyTile::kBytes};
        const KeyTile v_tile{tk_tile.base + KeyTile::kBytes};
        const KeyTile tv_tile{v_tile.base + KeyTile::kBytes};

        const auto load_keys = [&](int first_key) {
            load_tile<kThreads>(k_tile, k, first_key);
            if (has_tk) load_tile<kThreads>(tk_tile, tk, first_key);
            copy_async_commit();
        };
        const auto load_values = [&](int first_key) {
            if (has_t) load_tile<kThreads>(v_tile, v, first_key);
            if (has_tv) load_tile<kThreads>(tv_tile, tv, first_key);
            copy_async_commit();
        };

        const int key_end = block.key_end();
        const int unmasked_key_end = kMasked ? 0 : block.unmasked_key_end();
        const int row = 16 * warp_index();  // the first row of the warp, within the block
        const VisibleKeys<Element, kMasked> visible(p, block.sequence, block.head,
                                                    block.first_row + row);
        const float scale = p.softmax_scale;

        const RowLse lse(p, block, block.first_row + row);
        TangentWeights tangent_weights;
        // The weights of a row that sees no key are all 0: it needs no reference.
#pragma unroll
        for (int half = 0; half < 2; ++half) tangent_weights.known[half] = lse.sees_no_key(half);
        Accumulator<HeadDim> tout;

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

            // P = exp(S − lse); P and P∘(T − c), rounded
            Packed<Element, Keys> weights, weighted;
            subtract_lse(scores, 1, lse.subtrahend, lse.centres, [&](int half) {
                return load_lse_lo(p, block, block.first_row + row + row_in_warp(half));
            });
            scores.exp2();
            round_weights(weights, scores);
            if (has_t) tangent_weights.set_reference(scores, tangents, scale);
            if (has_t) tangent_weights.update(weighted, scores, tangents, scale);

            copy_async_wait<0>();
            block_barrier();  // V has arrived, and all warps have used K
            if (first_key + Keys < key_end) load_keys(first_key + Keys);

            // tO += P∘(T − c) V + P tV
            if (has_t) multiply<Element>(tout, weighted, v_tile);
            if (has_tv) multiply<Element>(tout, weights, tv_tile);
        }
        finish(p, block, block.first_row + row, tangent_weights, tout);
    }

private:
    // Centres tO; stores mu, tO and tout_lo.
    DEVICE static void finish(const AttentionParams& p, const RowBlock<Rows>& block, int first_row,
                              const TangentWeights& tangent_weights, Accumulator<HeadDim>& tout) {
        const GmemView out = block.rows_of(p.out, p.head_dim_v);
        const GmemView out_lo = block.rows_of(p.out_lo, p.head_dim_v);
        const GmemView target = block.rows_of(p.tout, p.head_dim_v);
        const GmemView target_lo = block.rows_of(p.tout_lo, p.head_dim_v);
        float* const mu = block.statistic(p.mu);
        const int lane = opaque(lane_index());
        float rounded_mean[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = first_row + lane / 4 + 8 * half;
            rounded_mean[half] = tangent_weights.rounded_sum.at(half);
            const float mean = quad_sum(tangent_weights.exact_sum[half]);
            if (lane % 4 == 0 && row < block.sequence.queries)
                global_store(mu + row, tangent_weights.reference[half] + mean);
        }
#pragma unroll
        for (int i = 0; i < tout.kBlocks; ++i) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = first_row + lane / 4 + 8 * half;
                const int column = 8 * i + lane % 4 * 2;
                const Pair rounded = load_pair<Element>(out, row, column);
                const Pair low = load_pair<Element>(out_lo, row, column);
                tout.at(i, half, 0) -= rounded_mean[half] * (rounded.low + low.low);
                tout.at(i, half, 1) -= rounded_mean[half] * (rounded.high + low.high);
            }
            store_block<Element>(target, target_lo, first_row, tout, i, lane);
        }
    }
};

}  // namespace jvp_attn
