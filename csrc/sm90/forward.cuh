// Forward: the equations of ../sm80/forward.cuh.
//
// The scores of the next tile of keys are computed while the weights of this one multiply its
// values: in each warpgroup, exponentials and products of successive tiles overlap
// (FlashAttention-3, arXiv 2407.08608, section 3.2).
#pragma once

#include "sm90/fwd_pipeline.cuh"
#include "sm90/store.cuh"
#include "sm90/weights.cuh"

namespace jvp_attn::sm90 {

template <class Element, int HeadDim, int Rows, int Keys>
struct Forward : FwdPipeline<HeadDim, Rows, Keys, 1> {
    using S = FwdPipeline<HeadDim, Rows, Keys, 1>;
    using typename S::KeyLoader, typename S::KeyReader, typename S::KeySlot, typename S::KeyTile;
    using typename S::RowLoader, typename S::RowReader, typename S::RowTile;

    DEVICE static void run(const Params& params) { S::template run<Forward>(params); }

    DEVICE static void load(const Params& params, const RowBlock<Rows>& block, RowLoader& rows,
                            KeyLoader& keys) {
        const AttentionParams& p = params.attention;
        const TensorMaps& maps = params.maps;
        const SeqlenInfo& sequence = block.sequence;
        rows.load(queries_of(params, p.q, maps.q, sequence, block.head), block.first_row);

        const Source k = keys_of(params, p.k, maps.k, sequence, block.head_k);
        const Source v = keys_of(params, p.v, maps.v, sequence, block.head_k);
        const int end = block.key_end();
        if (end > 0) keys.load(k, 0);
        for (int first_key = 0; first_key < end; first_key += Keys) {
            if (first_key + Keys < end) keys.load(k, first_key + Keys);
            keys.load_and_clear(v, first_key);
        }
    }

    DEVICE static void attend(const AttentionParams& p, const RowBlock<Rows>& block,
                              RowReader& rows, KeyReader& keys) {
        // Keys from `end` on are seen by no row of the block, those before `clear` by all.
        const int end = block.key_end();
        const int clear = block.unmasked_key_end();
        const int warp_row = S::warp_row();
        const CausalMask horizon{block.sequence, block.first_row + warp_row};
        const float log2_scale = p.softmax_scale * kLog2E;

        const RowTile q = rows.next();
        OnlineSoftmax softmax;
        Accumulator<HeadDim> out;
        Packed<Element, Keys> weights;
        float rescaling[2];
        if (end > 0) {
            const KeySlot k_slot = keys.at;
            const KeyTile k = keys.next();
            Accumulator<Keys> scores;
            start_scores(scores, q, k);
            wgmma_wait<0>();
            warpgroup_fence_operand(scores.value);
            keys.release(k_slot);
            if (Keys > clear) horizon.apply(scores, 0, -kInfinity);
            softmax.update(scores, log2_scale, rescaling);
            round_weights(weights, scores);
        }
#pragma unroll 1
        for (int first_key = Keys; first_key < end; first_key += Keys) {
            const KeySlot k_slot = keys.at;
            const KeyTile k = keys.next();
            const KeySlot v_slot = keys.at;
            const KeyTile v = keys.next();  // of the keys before
            Accumulator<Keys> scores;
            start_scores(scores, q, k);
            start_values(out, weights, v);
            wgmma_wait<1>();
            warpgroup_fence_operand(scores.value);
            keys.release(k_slot);

            if (first_key + Keys > clear) horizon.apply(scores, first_key, -kInfinity);
            softmax.update(scores, log2_scale, rescaling);
            wgmma_wait<0>();
            warpgroup_fence_operand(out.value);
            warpgroup_fence_operand(weights.word);
            keys.release(v_slot);
            round_weights(weights, scores);
            out.scale_rows(rescaling);
        }
        if (end > 0) {
            const KeySlot v_slot = keys.at;
            const KeyTile v = keys.next();
            start_values(out, weights, v);
            wgmma_wait<0>();
            warpgroup_fence_operand(out.value);
            warpgroup_fence_operand(weights.word);
            keys.release(v_slot);
        }
        S::products_are_done();
        finish(p, block, block.first_row + warp_row, softmax, out, {q, warp_row});
    }

private:
    DEVICE static void start_scores(Accumulator<Keys>& scores, const RowTile& q, const KeyTile& k) {
        warpgroup_fence_operand(scores.value);
        wgmma_fence();
        multiply_transposed<Element>(scores, q, S::warpgroup_row(), k, false);
        wgmma_commit();
    }

    DEVICE static void start_values(Accumulator<HeadDim>& out, Packed<Element, Keys>& weights,
                                    const KeyTile& v) {
        warpgroup_fence_operand(out.value);
        warpgroup_fence_operand(weights.word);
        wgmma_fence();
        multiply<Element>(out, weights, v);
        wgmma_commit();
    }

    DEVICE static void finish(const AttentionParams& p, const RowBlock<Rows>& block, int first_row,
                              const OnlineSoftmax& softmax, Accumulator<HeadDim>& out,
                              const Stage<Rows, HeadDim>& stage) {
        float normalisation[2];
        softmax.finish(p, block, first_row, normalisation);
        out.scale_rows(normalisation);
        store_rows<Element>(block.rows_of(p.out, p.head_dim_v),
                            block.rows_of(p.out_lo, p.head_dim_v), first_row, out, stage);
    }
};

}  // namespace jvp_attn::sm90
