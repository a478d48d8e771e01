// Forward: sm80/forward.cuh has the equations.
//
//     S = s Q Kᵀ      P = exp(S − lse)      O = P V
//
// Tiles: Q is Rows x HeadDim, K and V are Keys x HeadDim; a warpgroup computes 64 rows. A warpgroup
// issues S of a tile of keys together with the product with V of the previous tile, and computes
// the exponentials of S while wgmma computes that product (FlashAttention-3, arXiv 2407.08608,
// section 3.2). Except at head dim 256 the warpgroups also take turns.
#pragma once

#include "sm90/epilogue.cuh"
#include "sm90/fwd_pipeline.cuh"
#include "sm90/softmax.cuh"

namespace jvp_attn::sm90 {

// Whether waits for products stay behind the exponentials that overlap with these. nvcc
// -DJVP_ATTN_WAITS_BEHIND_EXPONENTIALS=0 lets ptxas move them, to compare both on a GPU.
#ifndef JVP_ATTN_WAITS_BEHIND_EXPONENTIALS
#define JVP_ATTN_WAITS_BEHIND_EXPONENTIALS 1
#endif
constexpr bool kWaitsBehindExponentials = JVP_ATTN_WAITS_BEHIND_EXPONENTIALS;

template <class Element, int HeadDim, int Rows, int Keys>
struct Forward : FwdPipeline<HeadDim, Rows, Keys, 1> {
    using Pipeline = FwdPipeline<HeadDim, Rows, Keys, 1>;
    using typename Pipeline::KeyLoader, typename Pipeline::KeyReader, typename Pipeline::KeySlot;
    using typename Pipeline::KeyTile, typename Pipeline::RowLoader, typename Pipeline::RowReader;
    using typename Pipeline::RowTile, typename Pipeline::Turn;

    // At head dim 256 products take four times as long as exponentials: turns can gain nothing.
    static constexpr bool kTurns = takes_turns(HeadDim <= 128);

    DEVICE static void run(const Params& params) { Pipeline::template run<Forward>(params); }

    // Loads Q, then K0, K1, V0, K2, V1, ...: the order in which `attend` reads them.
    DEVICE static void load(const Params& params, const RowBlock<Rows>& block, RowLoader& rows,
                            KeyLoader& keys) {
        const AttentionParams& p = params.attention;
        const TensorMaps& maps = params.maps;
        const SeqlenInfo& sequence = block.sequence;
        rows.load(queries_of(params, p.q, maps.q, sequence, block.head), block.first_row);

        const TmaSource k = keys_of(params, p.k, maps.k, sequence, block.head_k);
        const TmaSource v = keys_of(params, p.v, maps.v, sequence, block.head_k);
        const int end = block.key_end();
        if (end > 0) keys.load(k, 0);
        for (int first_key = 0; first_key < end; first_key += Keys) {
            if (first_key + Keys < end) keys.load(k, first_key + Keys);
            keys.load_and_clear(v, first_key);
        }
    }

    DEVICE static void attend(const AttentionParams& p, int work_tile, RowReader& rows,
                              KeyReader& keys) {
        const RowBlock<Rows> block = Pipeline::block_of(p, work_tile);
        const int key_end = block.key_end();
        const int warp_row = Pipeline::warp_row();
        const CausalMask causal_mask(block.sequence, block.first_row + warp_row);
        const float scale = p.softmax_scale;

        // wait for Q
        const RowTile q = rows.next();
        OnlineSoftmax softmax;
        Accumulator<HeadDim> out;
        Packed<Element, Keys> weights;
        float rescaling[2];
        if (key_end > 0) {
            // S = Q Kᵀ of the first tile
            const KeySlot k_slot = keys.at;
            const KeyTile k = keys.next();
            Accumulator<Keys> scores;
            issue_scores(scores, q, k);
            wgmma_wait_for<0>(scores);
            keys.release(k_slot);
            // P of the first tile
            if (causal_mask.hides_keys_before(Keys)) causal_mask.apply(scores, 0, -kInfinity);
            softmax.update(scores, scale, rescaling);
            round_weights(weights, scores);
        }
#pragma unroll 1
        for (int first_key = Keys; first_key < key_end; first_key += Keys) {
            // wait for K of this tile and V of the previous tile
            const KeySlot k_slot = keys.at;
            const KeyTile k = keys.next();
            const KeySlot v_slot = keys.at;
            const KeyTile v = keys.next();
            // issue S = Q Kᵀ of this tile, and O += P V of the previous tile
            Accumulator<Keys> scores;
            if (kTurns) Turn::await();
            issue_scores(scores, q, k);
            issue_output(out, weights, v);
            if (kTurns) Turn::pass();
            // wait for S
            wgmma_wait_for<1>(scores);
            if (!kWaitsBehindExponentials) keys.release(k_slot);

            // mask S; P = exp(S − max), while wgmma computes O
            if (causal_mask.hides_keys_before(first_key + Keys))
                causal_mask.apply(scores, first_key, -kInfinity);
            softmax.update(scores, scale, rescaling);
            // K is released only here: otherwise ptxas moves the next wait before the exponentials
            if (kWaitsBehindExponentials)
                keys.release_after(softmax.sum[0] + softmax.sum[1], k_slot);
            // wait for O
            wgmma_wait_for<0>(out, weights);
            keys.release(v_slot);
            // round P; rescale O to the new maximum
            round_weights(weights, scores);
            out.scale_rows(rescaling);
        }
        if (key_end > 0) {
            // O += P V of the last tile
            const KeySlot v_slot = keys.at;
            const KeyTile v = keys.next();
            issue_output(out, weights, v);
            wgmma_wait_for<0>(out, weights);
            keys.release(v_slot);
        }
        Pipeline::sync_warpgroup();
        // Computed again: to keep the block would cost registers in the loop.
        const RowBlock<Rows> again = Pipeline::block_of(p, opaque(work_tile));
        finish(p, again, again.first_row + warp_row, softmax, out, {q, warp_row});
    }

private:
    // S = Q Kᵀ, without the softmax scale.
    DEVICE static void issue_scores(Accumulator<Keys>& scores, const RowTile& q, const KeyTile& k) {
        const auto issue = [&] {
            multiply_transposed<Element>(scores, q, Pipeline::warpgroup_row(), k, false);
        };
        wgmma_group(issue, scores);
    }

    // O += P V
    DEVICE static void issue_output(Accumulator<HeadDim>& out, Packed<Element, Keys>& weights,
                                    const KeyTile& v) {
        wgmma_group([&] { multiply<Element>(out, weights, v); }, out, weights);
    }

    // Normalises O; stores lse, lse_lo, O and out_lo.
    DEVICE static void finish(const AttentionParams& p, const RowBlock<Rows>& block, int first_row,
                              const OnlineSoftmax& softmax, Accumulator<HeadDim>& out,
                              const StagingRows<Rows, HeadDim>& staging) {
        float normalisation[2];
        softmax.finish(p, block, first_row, normalisation);
        out.scale_rows(normalisation);
        store_rows<Element>(block.rows_of(p.out, p.head_dim_v),
                            block.rows_of(p.out_lo, p.head_dim_v), first_row, out, staging);
    }
};

}  // namespace jvp_attn::sm90
