// Forward JVP: O and its tangent tO in one pass over the keys. sm80/forward.cuh has the equations.
//
//     S = s Q Kᵀ     T = s (tQ Kᵀ + Q tKᵀ)     P = exp(S − lse)     mu = rowsum(P∘T)
//     O = P V        tO = (P∘T) V − mu O + P tV
//
// Tiles: Q and tQ are Rows x HeadDim; K, tK, V and tV are Keys x HeadDim; a warpgroup computes 64
// rows. O, tO, S and T fill its registers: P and P∘T replace S and T once both are computed.
//
// Two warpgroups take turns. In its turn a warpgroup issues the products with V and tV of one tile,
// then S and T of the next. It computes P and P∘T while wgmma works for the other.
#pragma once

#include "sm90/epilogue.cuh"
#include "sm90/fwd_pipeline.cuh"
#include "sm90/softmax.cuh"

namespace jvp_attn::sm90 {

// kKeyTangents is false if K and V have no tangents: then 4 products are enough instead of 6.
template <class Element, int HeadDim, int Rows, int Keys, bool kKeyTangents>
struct ForwardJvp : FwdPipeline<HeadDim, Rows, Keys, 2> {
    using Pipeline = FwdPipeline<HeadDim, Rows, Keys, 2>;
    using typename Pipeline::KeyLoader, typename Pipeline::KeyReader, typename Pipeline::KeySlot;
    using typename Pipeline::KeyTile, typename Pipeline::RowLoader, typename Pipeline::RowReader;
    using typename Pipeline::RowTile, typename Pipeline::Turn;

    static std::string why_not(const AttentionParams& p) {
        if (!kKeyTangents && (p.tk.data || p.tv.data))
            return "keys or values have tangents, which it does not read; forward_jvp does";
        return Pipeline::why_not(p);
    }

    static constexpr bool kTurns = takes_turns(true);
    static_assert(Pipeline::kSlots >= (kKeyTangents ? 4 : 2),
                  "V and tV of a tile, and K and tK of the next, which one turn reads");

    DEVICE static void run(const Params& params) { Pipeline::template run<ForwardJvp>(params); }

    DEVICE static void load(const Params& params, const RowBlock<Rows>& block, RowLoader& rows,
                            KeyLoader& keys) {
        const AttentionParams& p = params.attention;
        const TensorMaps& maps = params.maps;
        const SeqlenInfo& sequence = block.sequence;
        rows.load(queries_of(params, p.q, maps.q, sequence, block.head), block.first_row);
        rows.load(queries_of(params, p.tq, maps.tq, sequence, block.head), block.first_row);

        const TmaSource k = keys_of(params, p.k, maps.k, sequence, block.head_k);
        const TmaSource v = keys_of(params, p.v, maps.v, sequence, block.head_k);
        const TmaSource tk = keys_of(params, p.tk, maps.tk, sequence, block.head_k);
        const TmaSource tv = keys_of(params, p.tv, maps.tv, sequence, block.head_k);
        const int end = block.key_end();
        for (int first_key = 0; first_key < end; first_key += Keys) {
            keys.load(k, first_key);
            if (kKeyTangents) keys.load(tk, first_key);
            keys.load_and_clear(v, first_key);
            if (kKeyTangents) keys.load_and_clear(tv, first_key);
        }
    }

    DEVICE static void attend(const AttentionParams& p, int work_tile, RowReader& rows,
                              KeyReader& keys) {
        const RowBlock<Rows> block = Pipeline::block_of(p, work_tile);
        const int key_end = block.key_end();
        const int warp_row = Pipeline::warp_row();
        const CausalMask causal_mask(block.sequence, block.first_row + warp_row);
        const float scale = p.softmax_scale;

        // wait for Q and tQ
        const RowTile q = rows.next();
        const RowTile tq = rows.next();
        OnlineSoftmax softmax;
        TangentWeights tangent_weights;
        Accumulator<HeadDim> out, tout;
        Packed<Element, Keys> weights, weighted;
        // P and P∘(T − c) of a tile whose S and T are in flight; releases K and tK
        const auto compute_weights = [&](Accumulator<Keys>& scores, Accumulator<Keys>& tangents,
                                         int first_key, KeySlot k_slot, KeySlot tk_slot) {
            // wait for S
            wgmma_wait_for<1>(scores);
            // mask S; its maximum, while wgmma computes T
            if (causal_mask.hides_keys_before(first_key + Keys))
                causal_mask.apply(scores, first_key, -kInfinity);
            float rescaling[2];
            const auto exponents = softmax.update_max(scores, scale, rescaling);
            // rescale O, tO and the sums of P∘T to the new maximum
            out.scale_rows(rescaling);
            tout.scale_rows(rescaling);
            tangent_weights.rescale(rescaling);
            // wait for T
            wgmma_wait_for<0>(tangents);
            keys.release(k_slot);
            if (kKeyTangents) keys.release(tk_slot);

            // c of rows whose earlier weights, if any, are 0 beside those of this tile
            bool unset[2] = {rescaling[0] == 0, rescaling[1] == 0};
            tangent_weights.set_reference(
                unset, scores, [&](float score, int half) { return exponents.weight(score, half); },
                tangents, scale);
            // P = exp(S − max); P∘(T − c), rounded; P, rounded
            softmax.exponentiate(scores, exponents, rescaling);
            tangent_weights.update(weighted, scores, tangents, scale);
            round_weights(weights, scores);
        };
        if (key_end > 0) {
            // wait for K and tK of the first tile
            const KeySlot k_slot = keys.at;
            const KeyTile k = keys.next();
            const KeySlot tk_slot = keys.at;
            KeyTile tk;
            if (kKeyTangents) tk = keys.next();
            // issue its S = Q Kᵀ, and T = tQ Kᵀ + Q tKᵀ
            if (kTurns) Turn::await();
            Accumulator<Keys> scores, tangents;
            issue_scores(scores, q, k);
            issue_tangents(tangents, q, tq, k, tk);
            if (kTurns) Turn::pass();
            compute_weights(scores, tangents, 0, k_slot, tk_slot);
        }
#pragma unroll 1
        for (int first_key = Keys; first_key < key_end; first_key += Keys) {
            // wait for V and tV of the previous tile
            const KeySlot v_slot = keys.at;
            const KeyTile v = keys.next();
            const KeySlot tv_slot = keys.at;
            KeyTile tv;
            if (kKeyTangents) tv = keys.next();
            // issue O += P V, and tO += P tV + P∘(T − c) V of the previous tile
            if (kTurns) Turn::await();
            issue_outputs(out, tout, weights, weighted, v, tv);
            // wait for K of this tile; issue S = Q Kᵀ
            const KeySlot k_slot = keys.at;
            const KeyTile k = keys.next();
            Accumulator<Keys> scores, tangents;
            issue_scores(scores, q, k);
            // wait for O and tO, whose weights are in the registers of T, while wgmma computes S
            wgmma_wait_for<1>(out, tout, weights, weighted);
            keys.release(v_slot);
            if (kKeyTangents) keys.release(tv_slot);
            // wait for tK; issue T = tQ Kᵀ + Q tKᵀ
            const KeySlot tk_slot = keys.at;
            KeyTile tk;
            if (kKeyTangents) tk = keys.next();
            issue_tangents(tangents, q, tq, k, tk);
            if (kTurns) Turn::pass();
            compute_weights(scores, tangents, first_key, k_slot, tk_slot);
        }
        if (key_end > 0) {
            // O and tO of the last tile
            const KeySlot v_slot = keys.at;
            const KeyTile v = keys.next();
            const KeySlot tv_slot = keys.at;
            KeyTile tv;
            if (kKeyTangents) tv = keys.next();
            if (kTurns) Turn::await();
            issue_outputs(out, tout, weights, weighted, v, tv);
            if (kTurns) Turn::pass();
            wgmma_wait_for<0>(out, tout, weights, weighted);
            keys.release(v_slot);
            if (kKeyTangents) keys.release(tv_slot);
        }
        Pipeline::sync_warpgroup();
        // Computed again: to keep the block would cost registers in the loop.
        const RowBlock<Rows> again = Pipeline::block_of(p, opaque(work_tile));
        finish(p, again, again.first_row + warp_row, softmax, tangent_weights, out, tout,
               {q, warp_row});
    }

private:
    // S = Q Kᵀ, without the softmax scale.
    DEVICE static void issue_scores(Accumulator<Keys>& scores, const RowTile& q, const KeyTile& k) {
        const auto issue = [&] {
            multiply_transposed<Element>(scores, q, Pipeline::warpgroup_row(), k, false);
        };
        wgmma_group(issue, scores);
    }

    // T = tQ Kᵀ + Q tKᵀ, without the softmax scale.
    DEVICE static void issue_tangents(Accumulator<Keys>& tangents, const RowTile& q,
                                      const RowTile& tq, const KeyTile& k, const KeyTile& tk) {
        const auto issue = [&] {
            multiply_transposed<Element>(tangents, tq, Pipeline::warpgroup_row(), k, false);
            if (kKeyTangents)
                multiply_transposed<Element>(tangents, q, Pipeline::warpgroup_row(), tk, true);
        };
        wgmma_group(issue, tangents);
    }

    // O += P V, and tO += P tV + P∘(T − c) V
    DEVICE static void issue_outputs(Accumulator<HeadDim>& out, Accumulator<HeadDim>& tout,
                                     Packed<Element, Keys>& weights,
                                     Packed<Element, Keys>& weighted, const KeyTile& v,
                                     const KeyTile& tv) {
        const auto issue = [&] {
            multiply<Element>(out, weights, v);
            if (kKeyTangents) multiply<Element>(tout, weights, tv);
            multiply<Element>(tout, weighted, v);
        };
        wgmma_group(issue, out, tout, weights, weighted);
    }

    // Normalises and centres; stores lse, lse_lo, mu, O, tO, out_lo and tout_lo.
    DEVICE static void finish(const AttentionParams& p, const RowBlock<Rows>& block, int first_row,
                              const OnlineSoftmax& softmax, const TangentWeights& tangent_weights,
                              Accumulator<HeadDim>& out, Accumulator<HeadDim>& tout,
                              const StagingRows<Rows, HeadDim>& staging) {
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
        tout.subtract_scaled_rows(rounded_mean, out);
        store_rows<Element>(block.rows_of(p.out, p.head_dim_v),
                            block.rows_of(p.out_lo, p.head_dim_v), first_row, out, staging);
        store_rows<Element>(block.rows_of(p.tout, p.head_dim_v),
                            block.rows_of(p.tout_lo, p.head_dim_v), first_row, tout, staging);
    }
};

}  // namespace jvp_attn::sm90
