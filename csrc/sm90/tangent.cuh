// Tangent only: tO of an output that is known, with its lse. sm80/tangent.cuh has the equations.
//
//     S = s Q Kᵀ     T = s (tQ Kᵀ + Q tKᵀ)     P = exp(S − lse)     mu = rowsum(P∘T)
//     tO = (P∘T) V − mu O + P tV
//
// Tiles: Q and tQ are Rows x HeadDim; K, tK, V and tV are Keys x HeadDim; a warpgroup computes 64
// rows. There is one accumulator of HeadDim columns instead of two, so that head_dim 256 fits. P is
// computed while wgmma computes T, and P∘T while it computes P tV.
#pragma once

#include "sm90/epilogue.cuh"
#include "sm90/fwd_pipeline.cuh"
#include "sm90/softmax.cuh"

namespace jvp_attn::sm90 {

template <class Element, int HeadDim, int Rows, int Keys>
struct TangentOnly : FwdPipeline<HeadDim, Rows, Keys, 2> {
    using Pipeline = FwdPipeline<HeadDim, Rows, Keys, 2>;
    using typename Pipeline::KeyLoader, typename Pipeline::KeyReader, typename Pipeline::KeySlot;
    using typename Pipeline::KeyTile, typename Pipeline::RowLoader, typename Pipeline::RowReader;
    using typename Pipeline::RowTile;

    static constexpr bool kTurns = false;  // two warpgroups keep the tensor cores busy without

    DEVICE static void run(const Params& params) { Pipeline::template run<TangentOnly>(params); }

    DEVICE static void load(const Params& params, const RowBlock<Rows>& block, RowLoader& rows,
                            KeyLoader& keys) {
        const AttentionParams& p = params.attention;
        const TensorMaps& maps = params.maps;
        const SeqlenInfo& sequence = block.sequence;
        rows.load(queries_of(params, p.q, maps.q, sequence, block.head), block.first_row);
        rows.load(queries_of(params, p.tq, maps.tq, sequence, block.head), block.first_row);

        // Computed again for each tile: the producer warp has few registers.
        const auto source = [&](const Tensor& x, const TensorMap& map) {
            return keys_of(params, x, map, sequence, block.head_k);
        };
        const int end = block.key_end();
#pragma unroll 1
        for (int first_key = 0; first_key < end; first_key += Keys) {
            keys.load(source(p.k, maps.k), first_key);
            keys.load(source(p.tk, maps.tk), first_key);
            keys.load_and_clear(source(p.tv, maps.tv), first_key);
            keys.load_and_clear(source(p.v, maps.v), first_key);
        }
    }

    DEVICE static void attend(const AttentionParams& p, int work_tile, RowReader& rows,
                              KeyReader& keys) {
        const RowBlock<Rows> block = Pipeline::block_of(p, work_tile);
        const int key_end = block.key_end();
        const int row = Pipeline::warpgroup_row(), warp_row = Pipeline::warp_row();
        const CausalMask causal_mask(block.sequence, block.first_row + warp_row);
        const float scale = p.softmax_scale;
        const RowLse lse(p, block, block.first_row + warp_row);

        // wait for Q and tQ
        const RowTile q = rows.next();
        const RowTile tq = rows.next();
        TangentWeights tangent_weights;
        bool unset[2] = {true, true};
        Accumulator<HeadDim> tout;
#pragma unroll 1
        for (int first_key = 0; first_key < key_end; first_key += Keys) {
            // wait for K and tK
            const KeySlot k_slot = keys.at;
            const KeyTile k = keys.next();
            const KeySlot tk_slot = keys.at;
            const KeyTile tk = keys.next();
            // issue S = Q Kᵀ, and T = tQ Kᵀ + Q tKᵀ
            Accumulator<Keys> scores, tangents;
            wgmma_group([&] { multiply_transposed<Element>(scores, q, row, k, false); }, scores);
            issue_tangents(tangents, q, tq, row, k, tk);
            // wait for S
            wgmma_wait_for<1>(scores);

            // mask S; P = exp(S − lse), while wgmma computes T; P, rounded
            if (causal_mask.hides_keys_before(first_key + Keys))
                causal_mask.apply(scores, first_key, -kInfinity);
            subtract_lse(scores, scale, lse.subtrahend, lse.centres, [&](int half) {
                return load_lse_lo(p, block, block.first_row + warp_row + row_in_warp(half));
            });
            scores.exp2();
            Packed<Element, Keys> weights;
            round_weights(weights, scores);

            // wait for tV; issue tO += P tV
            const KeySlot tv_slot = keys.at;
            const KeyTile tv = keys.next();
            wgmma_group([&] { multiply<Element>(tout, weights, tv); }, tout, weights);
            // wait for T
            wgmma_wait_for<1>(tangents);
            keys.release(k_slot);
            keys.release(tk_slot);

            // c of rows that had no weight so far
            tangent_weights.set_reference(
                unset, scores, [](float weight, int) { return weight; }, tangents, scale);
            // P∘(T − c), rounded, while wgmma computes P tV
            Packed<Element, Keys> weighted;
            tangent_weights.update(weighted, scores, tangents, scale);
            // wait for V; tO += P∘(T − c) V
            const KeySlot v_slot = keys.at;
            const KeyTile v = keys.next();
            wgmma_group([&] { multiply<Element>(tout, weighted, v); }, weighted);
            wgmma_wait_for<0>(tout, weights, weighted);
            keys.release(tv_slot);
            keys.release(v_slot);
        }
        Pipeline::sync_warpgroup();
        // Computed again: to keep the block would cost registers in the loop.
        const RowBlock<Rows> again = Pipeline::block_of(p, opaque(work_tile));
        finish(p, again, again.first_row + warp_row, tangent_weights, tout, {q, warp_row});
    }

private:
    // T = tQ Kᵀ + Q tKᵀ, without the softmax scale.
    DEVICE static void issue_tangents(Accumulator<Keys>& tangents, const RowTile& q,
                                      const RowTile& tq, int row, const KeyTile& k,
                                      const KeyTile& tk) {
        const auto issue = [&] {
            multiply_transposed<Element>(tangents, tq, row, k, false);
            multiply_transposed<Element>(tangents, q, row, tk, true);
        };
        wgmma_group(issue, tangents);
    }

    // Centres tO; stores mu, tO and tout_lo.
    DEVICE static void finish(const AttentionParams& p, const RowBlock<Rows>& block, int first_row,
                              const TangentWeights& tangent_weights, Accumulator<HeadDim>& tout,
                              const StagingRows<Rows, HeadDim>& staging) {
        float* const mu = block.statistic(p.mu);
        float rounded_mean[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            rounded_mean[half] = quad_sum(tangent_weights.rounded_sum[half]);
            const float mean = quad_sum(tangent_weights.exact_sum[half]);
            const int row = first_row + row_in_warp(half);
            if (lane_index() % 4 == 0 && row < block.sequence.queries)
                global_store(mu + row, tangent_weights.reference[half] + mean);
        }
        subtract_rows<Element>(tout, rounded_mean, block.rows_of(p.out, p.head_dim_v), first_row,
                               staging);
        subtract_rows<Element>(tout, rounded_mean, block.rows_of(p.out_lo, p.head_dim_v), first_row,
                               staging);
        store_rows<Element>(block.rows_of(p.tout, p.head_dim_v),
                            block.rows_of(p.tout_lo, p.head_dim_v), first_row, tout, staging);
    }
};

}  // namespace jvp_attn::sm90
