// Forward: the equations of ../sm80/forward.cuh.
//
// As in forward_tangent.cuh, but the scores of the next tile of keys are computed while the weights
// of this one multiply its values: in each warpgroup, exponentials and products of successive tiles
// overlap (FlashAttention-3, arXiv 2407.08608, section 3.2).
#pragma once

#include "sm90/loader.cuh"
#include "sm90/store.cuh"
#include "sm90/weights.cuh"
#include "sm90/work.cuh"

namespace jvp_attn::sm90 {

template <class Element, int HeadDim, int Rows, int Keys>
struct Forward {
    using RowTile = Tile<Rows, HeadDim>;
    using KeyTile = Tile<Keys, HeadDim>;

    static constexpr int kWarpgroups = Rows / 64;  // that multiply
    static constexpr int kThreads = (1 + kWarpgroups) * kWarpgroupThreads;
    static constexpr int kRowBox = Rows, kKeyBox = Keys;

    using RowRing = Ring<1, RowTile::kBytes>;
    static constexpr int kBarrierBytes = RowRing::kBarrierBytes + 8;
    // As many as fit in.
    static constexpr int kSlots =
        (kMaxSharedBytes - RowRing::kBytes - kBarrierBytes) / (KeyTile::kBytes + 16);
    using KeyRing = Ring<kSlots, KeyTile::kBytes>;
    static constexpr int kSharedBytes =
        RowRing::kBytes + KeyRing::kBytes + KeyRing::kBarrierBytes + kBarrierBytes;

    static int64_t work(const AttentionParams& p) { return RowBlock<Rows>::count(p); }

    DEVICE static void run(const Params& params) {
        const SharedAddress memory = shared_memory();
        const SharedAddress barriers = memory + RowRing::kBytes + KeyRing::kBytes;
        const RowRing rows{memory, barriers};
        const KeyRing keys{memory + RowRing::kBytes, barriers + RowRing::kBarrierBytes};
        const SharedAddress landed = keys.barriers + KeyRing::kBarrierBytes;
        if (thread_index() == 0) {
            rows.init(1, kWarpgroups * 4);
            keys.init(1, kWarpgroups);
            mbarrier_init(landed, 1);
            fence_mbarrier_init();
        }
        block_barrier();

        if (warpgroup_index() == 0) {
            release_registers<kWarpgroups == 2 ? 24 : 32>();
            if (warp_index() == 0) load(params, {rows, landed}, {keys, landed});
        } else {
            claim_registers<kWarpgroups == 2 ? 240 : 160>();
            Attention attention{params.attention, rows, keys};
            for (Turn turn(params); turn; turn.next()) {
                const auto block = row_block<Rows>(params.attention, turn.piece());
                if (!block.is_empty()) attention.attend(block);
            }
        }
    }

private:
    DEVICE static void load(const Params& params, Loader<RowTile, 1> rows,
                            Loader<KeyTile, kSlots> keys) {
        const AttentionParams& p = params.attention;
        const TensorMaps& maps = params.maps;
        for (Turn turn(params); turn; turn.next()) {
            const auto block = row_block<Rows>(p, turn.piece());
            if (block.is_empty()) continue;
            rows.load(queries_of(params, p.q, maps.q, block.sequence, block.head), block.first_row);
            const Source k = keys_of(params, p.k, maps.k, block.sequence, block.head_k);
            const Source v = keys_of(params, p.v, maps.v, block.sequence, block.head_k);
            const int end = block.seen_by_none();
            // In the order in which they are needed.
            if (end > 0) keys.load(k, 0);
            for (int first_key = 0; first_key < end; first_key += Keys) {
                if (first_key + Keys < end) keys.load(k, first_key + Keys);
                keys.load_and_clear(v, first_key);
            }
        }
    }

    // What a warpgroup does with its rows of a block of rows.
    struct Attention {
        const AttentionParams& p;
        const RowRing& rows;
        const KeyRing& keys;
        Position<1> row_slot = {};
        Position<kSlots> key_slot = {};

        DEVICE void attend(const RowBlock<Rows>& block) {
            // Keys from `end` on are seen by no row of the block, those before `clear` by all.
            const int end = block.seen_by_none();
            const int clear = block.seen_by_all();
            const int row = (warpgroup_index() - 1) * 64;  // within the block
            const int warp_row = row + warp_index() % 4 * 16;
            const Horizon horizon{block.sequence, block.first_row + warp_row};
            const float log2_scale = p.softmax_scale * kLog2E;

            rows.wait_full(row_slot);
            const RowTile q{rows.slot(row_slot)};

            OnlineSoftmax softmax;
            Accumulator<HeadDim> out;
            Packed<Element, Keys> weights;
            float rescaling[2];
            if (end > 0) {
                Accumulator<Keys> scores;
                const Position<kSlots> k_slot = key_slot;
                const KeyTile k = next();
                start_scores(scores, q, row, k);
                wgmma_wait<0>();
                pin(scores.value);
                release(k_slot);
                if (Keys > clear) horizon.replace_hidden(scores, 0, -kInfinity);
                softmax.update(scores, log2_scale, rescaling);
                round_weights(weights, scores);
            }
#pragma unroll 1
            for (int first_key = Keys; first_key < end; first_key += Keys) {
                const Position<kSlots> k_slot = key_slot;
                const KeyTile k = next();
                const Position<kSlots> v_slot = key_slot;
                const KeyTile v = next();
                Accumulator<Keys> scores;
                start_scores(scores, q, row, k);
                start_values(out, weights, v);
                wgmma_wait<1>();
                pin(scores.value);
                release(k_slot);

                if (first_key + Keys > clear) horizon.replace_hidden(scores, first_key, -kInfinity);
                softmax.update(scores, log2_scale, rescaling);
                wgmma_wait<0>();
                pin(out.value);
                pin(weights.word);
                release(v_slot);
                round_weights(weights, scores);
                out.scale_rows(rescaling);
            }
            if (end > 0) {
                const Position<kSlots> v_slot = key_slot;
                const KeyTile v = next();
                start_values(out, weights, v);
                wgmma_wait<0>();
                pin(out.value);
                pin(weights.word);
                release(v_slot);
            }
            // All warps are done with Q: each has a part of it to store its rows through.
            named_barrier_sync(warpgroup_index(), kWarpgroupThreads);
            finish(block, warp_row, softmax, out, {q, warp_row});
            fence_proxy_async();
            warp_barrier();
            if (lane_index() == 0) rows.release(row_slot);
            row_slot.advance();
        }

        // Waits for the next tile of keys or values.
        DEVICE KeyTile next() {
            keys.wait_full(key_slot);
            const KeyTile tile{keys.slot(key_slot)};
            key_slot.advance();
            return tile;
        }

        // One thread speaks for the warpgroup: products are done for all of it at once.
        DEVICE void release(const Position<kSlots>& at) const {
            if (thread_index() % kWarpgroupThreads == 0) keys.release(at);
        }

        DEVICE static void start_scores(Accumulator<Keys>& scores, const RowTile& q, int row,
                                        const KeyTile& k) {
            pin(scores.value);
            wgmma_fence();
            multiply_transposed<Element>(scores, q, row, k, false);
            wgmma_commit();
        }

        DEVICE static void start_values(Accumulator<HeadDim>& out, Packed<Element, Keys>& weights,
                                        const KeyTile& v) {
            pin(out.value);
            pin(weights.word);
            wgmma_fence();
            multiply<Element>(out, weights, v);
            wgmma_commit();
        }

        DEVICE void finish(const RowBlock<Rows>& block, int warp_row, const OnlineSoftmax& softmax,
                           Accumulator<HeadDim>& out, const Stage<Rows, HeadDim>& stage) const {
            const int first_row = block.first_row + warp_row;
            float* const lse = block.statistic(p.lse);
            float normalisation[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float sum = quad_sum(softmax.sum[half]);
                normalisation[half] = sum == 0 ? 0 : 1 / sum;  // 0 in a row that sees no key
                const int row = first_row + row_in_warp(half);
                if (lane_index() % 4 == 0 && row < block.sequence.queries)
                    global_store(lse + row, softmax.lse(half, sum, p.softmax_scale));
            }
            out.scale_rows(normalisation);
            store_rows<Element>(block.rows_of(p.out, p.head_dim_v),
                                block.rows_of(p.out_residual, p.head_dim_v), first_row, out, stage);
        }
    };
};

}  // namespace jvp_attn::sm90
