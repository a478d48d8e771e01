// The tangent of an output that is known already, with its lse: the equations of
// ../sm80/tangent.cuh.
//
// With one accumulator instead of two, head_dim 256 fits. The scores of a tile of keys turn into
// weights while their tangents are computed.
#pragma once

#include "sm90/fwd_pipeline.cuh"
#include "sm90/store.cuh"
#include "sm90/weights.cuh"

namespace jvp_attn::sm90 {

template <class Element, int HeadDim, int Rows, int Keys>
struct TangentOnly : FwdPipeline<HeadDim, Rows, Keys, 2> {
    using S = FwdPipeline<HeadDim, Rows, Keys, 2>;
    using typename S::KeyLoader, typename S::KeyReader, typename S::KeySlot, typename S::KeyTile;
    using typename S::RowLoader, typename S::RowReader, typename S::RowTile;

    DEVICE static void run(const Params& params) { S::template run<TangentOnly>(params); }

    DEVICE static void load(const Params& params, const RowBlock<Rows>& block, RowLoader& rows,
                            KeyLoader& keys) {
        const AttentionParams& p = params.attention;
        const TensorMaps& maps = params.maps;
        const SeqlenInfo& sequence = block.sequence;
        rows.load(queries_of(params, p.q, maps.q, sequence, block.head), block.first_row);
        rows.load(queries_of(params, p.tq, maps.tq, sequence, block.head), block.first_row);

        // Made anew for each tile: the loading warp has few registers.
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

    DEVICE static void attend(const AttentionParams& p, const RowBlock<Rows>& block,
                              RowReader& rows, KeyReader& keys) {
        // Keys from `end` on are seen by no row of the block, those before `clear` by all.
        const int end = block.key_end();
        const int clear = block.unmasked_key_end();
        const int row = S::warpgroup_row(), warp_row = S::warp_row();
        const CausalMask horizon{block.sequence, block.first_row + warp_row};
        const float scale = p.softmax_scale, log2_scale = scale * kLog2E;

        const float* const lse = block.statistic(p.lse);
        float log2_sum[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int query = block.first_row + warp_row + row_in_warp(half);
            log2_sum[half] =
                query < block.sequence.queries ? log2_of_sum(global_load(lse + query)) : kInfinity;
        }

        const RowTile q = rows.next();
        const RowTile tq = rows.next();
        TangentWeights tangent_weights;
        if (end > 0) {
            // T of the first keys, ahead of time: there are registers left for it.
            KeyReader ahead = keys;
            const KeyTile k = ahead.next(), tk = ahead.next();
            Accumulator<Keys> tangents;
            start_tangents(tangents, q, tq, row, k, tk);
            wgmma_wait<0>();
            warpgroup_fence_operand(tangents.value);
            horizon.apply(tangents, 0, 0);
            tangent_weights.set_reference(tangents, horizon, scale);
        }
        Accumulator<HeadDim> tout;
#pragma unroll 1
        for (int first_key = 0; first_key < end; first_key += Keys) {
            const KeySlot k_slot = keys.at;
            const KeyTile k = keys.next();
            const KeySlot tk_slot = keys.at;
            const KeyTile tk = keys.next();
            Accumulator<Keys> scores, tangents;
            warpgroup_fence_operand(scores.value);
            wgmma_fence();
            multiply_transposed<Element>(scores, q, row, k, false);
            wgmma_commit();
            start_tangents(tangents, q, tq, row, k, tk);
            wgmma_wait<1>();
            warpgroup_fence_operand(scores.value);

            if (first_key + Keys > clear) horizon.apply(scores, first_key, -kInfinity);
            scores.scale(log2_scale);
            exponentiate(scores, log2_sum);
            Packed<Element, Keys> weights;
            round_weights(weights, scores);

            const KeySlot tv_slot = keys.at;
            const KeyTile tv = keys.next();
            start_values(tout, weights, tv);
            wgmma_wait<1>();
            warpgroup_fence_operand(tangents.value);
            keys.release(k_slot);
            keys.release(tk_slot);

            Packed<Element, Keys> weighted;
            tangent_weights.update(weighted, scores, tangents, scale);
            const KeySlot v_slot = keys.at;
            const KeyTile v = keys.next();
            warpgroup_fence_operand(weighted.word);
            wgmma_fence();
            multiply<Element>(tout, weighted, v);
            wgmma_commit();
            wgmma_wait<0>();
            warpgroup_fence_operand(tout.value);
            warpgroup_fence_operand(weights.word);
            warpgroup_fence_operand(weighted.word);
            keys.release(tv_slot);
            keys.release(v_slot);
        }
        S::products_are_done();
        finish(p, block, block.first_row + warp_row, tangent_weights, tout, {q, warp_row});
    }

private:
    // T of a tile of keys, without the softmax scale.
    DEVICE static void start_tangents(Accumulator<Keys>& tangents, const RowTile& q,
                                      const RowTile& tq, int row, const KeyTile& k,
                                      const KeyTile& tk) {
        warpgroup_fence_operand(tangents.value);
        wgmma_fence();
        multiply_transposed<Element>(tangents, tq, row, k, false);
        multiply_transposed<Element>(tangents, q, row, tk, true);
        wgmma_commit();
    }

    DEVICE static void start_values(Accumulator<HeadDim>& tout, Packed<Element, Keys>& weights,
                                    const KeyTile& tv) {
        warpgroup_fence_operand(tout.value);
        warpgroup_fence_operand(weights.word);
        wgmma_fence();
        multiply<Element>(tout, weights, tv);
        wgmma_commit();
    }

    DEVICE static void finish(const AttentionParams& p, const RowBlock<Rows>& block, int first_row,
                              const TangentWeights& tangent_weights, Accumulator<HeadDim>& tout,
                              const Stage<Rows, HeadDim>& stage) {
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
                               stage);
        subtract_rows<Element>(tout, rounded_mean, block.rows_of(p.out_lo, p.head_dim_v), first_row,
                               stage);
        store_rows<Element>(block.rows_of(p.tout, p.head_dim_v),
                            block.rows_of(p.tout_lo, p.head_dim_v), first_row, tout, stage);
    }
};

}  // namespace jvp_attn::sm90
