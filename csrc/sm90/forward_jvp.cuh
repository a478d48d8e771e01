// Forward with tangent in one pass over the keys: the equations of ../sm80/forward.cuh.
//
// Of a tile of keys a warpgroup starts the scores and their tangents together. While the tensor
// cores compute the tangents it computes the weights, and when both are there it rounds them in
// place: out, tout, scores and tangents are all that the registers can hold. While it weights and
// rounds tangents, the tensor cores work for the other warpgroup.
#pragma once

#include "sm90/fwd_pipeline.cuh"
#include "sm90/store.cuh"
#include "sm90/weights.cuh"

namespace jvp_attn::sm90 {

// Where keys and values have no tangents, kKeyTangents is false, and 4 products do instead of 6.
template <class Element, int HeadDim, int Rows, int Keys, bool kKeyTangents>
struct ForwardJvp : FwdPipeline<HeadDim, Rows, Keys, 2> {
    using S = FwdPipeline<HeadDim, Rows, Keys, 2>;
    using typename S::KeyLoader, typename S::KeyReader, typename S::KeySlot, typename S::KeyTile;
    using typename S::RowLoader, typename S::RowReader, typename S::RowTile;

    static std::string why_not(const AttentionParams& p) {
        if (!kKeyTangents && (p.tk.data || p.tv.data))
            return "keys or values have tangents, which it would not read; forward_jvp does";
        return S::why_not(p);
    }

    DEVICE static void run(const Params& params) { S::template run<ForwardJvp>(params); }

    DEVICE static void load(const Params& params, const RowBlock<Rows>& block, RowLoader& rows,
                            KeyLoader& keys) {
        const AttentionParams& p = params.attention;
        const TensorMaps& maps = params.maps;
        const SeqlenInfo& sequence = block.sequence;
        rows.load(queries_of(params, p.q, maps.q, sequence, block.head), block.first_row);
        rows.load(queries_of(params, p.tq, maps.tq, sequence, block.head), block.first_row);

        const Source k = keys_of(params, p.k, maps.k, sequence, block.head_k);
        const Source v = keys_of(params, p.v, maps.v, sequence, block.head_k);
        const Source tk = keys_of(params, p.tk, maps.tk, sequence, block.head_k);
        const Source tv = keys_of(params, p.tv, maps.tv, sequence, block.head_k);
        const int end = block.key_end();
        for (int first_key = 0; first_key < end; first_key += Keys) {
            keys.load(k, first_key);
            if (kKeyTangents) keys.load(tk, first_key);
            keys.load_and_clear(v, first_key);
            if (kKeyTangents) keys.load_and_clear(tv, first_key);
        }
    }

    DEVICE static void attend(const AttentionParams& p, const RowBlock<Rows>& block,
                              RowReader& rows, KeyReader& keys) {
        // Keys from `end` on are seen by no row of the block, those before `clear` by all.
        const int end = block.key_end();
        const int clear = block.unmasked_key_end();
        const int warp_row = S::warp_row();
        const CausalMask horizon{block.sequence, block.first_row + warp_row};
        const float scale = p.softmax_scale;

        const RowTile q = rows.next();
        const RowTile tq = rows.next();
        OnlineSoftmax softmax;
        TangentWeights tangent_weights;
        if (end > 0) {
            // T of the first keys, ahead of time: there are registers left for it.
            KeyReader ahead = keys;
            const KeyTile k = ahead.next();
            KeyTile tk;
            if (kKeyTangents) tk = ahead.next();
            Accumulator<Keys> tangents;
            start_tangents(tangents, q, tq, k, tk);
            wgmma_wait<0>();
            warpgroup_fence_operand(tangents.value);
            horizon.apply(tangents, 0, 0);
            tangent_weights.set_reference(tangents, horizon, scale);
        }
        Accumulator<HeadDim> out, tout;
#pragma unroll 1
        for (int first_key = 0; first_key < end; first_key += Keys) {
            const KeySlot k_slot = keys.at;
            const KeyTile k = keys.next();
            const KeySlot tk_slot = keys.at;
            KeyTile tk;
            if (kKeyTangents) tk = keys.next();
            Accumulator<Keys> scores, tangents;
            warpgroup_fence_operand(scores.value);
            wgmma_fence();
            multiply_transposed<Element>(scores, q, S::warpgroup_row(), k, false);
            wgmma_commit();
            start_tangents(tangents, q, tq, k, tk);
            wgmma_wait<1>();
            warpgroup_fence_operand(scores.value);

            if (first_key + Keys > clear) horizon.apply(scores, first_key, -kInfinity);
            float rescaling[2];
            softmax.update(scores, scale * kLog2E, rescaling);
            out.scale_rows(rescaling);
            tout.scale_rows(rescaling);
            tangent_weights.rescale(rescaling);
            wgmma_wait<0>();
            warpgroup_fence_operand(tangents.value);
            keys.release(k_slot);
            if (kKeyTangents) keys.release(tk_slot);

            Packed<Element, Keys> weights, weighted;
            tangent_weights.update(weighted, scores, tangents, scale);
            round_weights(weights, scores);
            const KeySlot v_slot = keys.at;
            const KeyTile v = keys.next();
            const KeySlot tv_slot = keys.at;
            KeyTile tv;
            if (kKeyTangents) tv = keys.next();
            warpgroup_fence_operand(out.value);
            warpgroup_fence_operand(tout.value);
            warpgroup_fence_operand(weights.word);
            warpgroup_fence_operand(weighted.word);
            wgmma_fence();
            multiply<Element>(out, weights, v);
            if (kKeyTangents) multiply<Element>(tout, weights, tv);
            multiply<Element>(tout, weighted, v);
            wgmma_commit();
            wgmma_wait<0>();
            warpgroup_fence_operand(out.value);
            warpgroup_fence_operand(tout.value);
            warpgroup_fence_operand(weights.word);
            warpgroup_fence_operand(weighted.word);
            keys.release(v_slot);
            if (kKeyTangents) keys.release(tv_slot);
        }
        S::products_are_done();
        finish(p, block, block.first_row + warp_row, softmax, tangent_weights, out, tout,
               {q, warp_row});
    }

private:
    // T of a tile of keys, without the softmax scale.
    DEVICE static void start_tangents(Accumulator<Keys>& tangents, const RowTile& q,
                                      const RowTile& tq, const KeyTile& k, const KeyTile& tk) {
        warpgroup_fence_operand(tangents.value);
        wgmma_fence();
        multiply_transposed<Element>(tangents, tq, S::warpgroup_row(), k, false);
        if (kKeyTangents) multiply_transposed<Element>(tangents, q, S::warpgroup_row(), tk, true);
        wgmma_commit();
    }

    DEVICE static void finish(const AttentionParams& p, const RowBlock<Rows>& block, int first_row,
                              const OnlineSoftmax& softmax, const TangentWeights& tangent_weights,
                              Accumulator<HeadDim>& out, Accumulator<HeadDim>& tout,
                              const Stage<Rows, HeadDim>& stage) {
        float* const mu = block.statistic(p.mu);
        float normalisation[2], rounded_mean[2];
        softmax.finish(p, block, first_row, normalisation);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            rounded_mean[half] = quad_sum(tangent_weights.rounded_sum[half]) * normalisation[half];
            const float mean = quad_sum(tangent_weights.exact_sum[half]) * normalisation[half];
            const int row = first_row + row_in_warp(half);
            if (lane_index() % 4 == 0 && row < block.sequence.queries)
                global_store(mu + row, tangent_weights.reference[half] + mean);
        }
        out.scale_rows(normalisation);
        tout.scale_rows(normalisation);
#pragma unroll
        for (int i = 0; i < tout.kBlocks; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e) tout.value[i][e] -= rounded_mean[e / 2] * out.value[i][e];
        store_rows<Element>(block.rows_of(p.out, p.head_dim_v),
                            block.rows_of(p.out_lo, p.head_dim_v), first_row, out, stage);
        store_rows<Element>(block.rows_of(p.tout, p.head_dim_v),
                            block.rows_of(p.tout_lo, p.head_dim_v), first_row, tout, stage);
    }
};

}  // namespace jvp_attn::sm90
