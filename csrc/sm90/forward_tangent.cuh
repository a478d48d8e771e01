// Forward with tangent in one pass over the keys: the equations of ../sm80/forward.cuh.
//
// A block takes some rows of one head after the other. One warp of it loads: Q and tQ, and a ring
// of tiles in which K, tK, V and tV stream by. Each of the other warpgroups multiplies 64 rows. Of
// a tile of keys it computes the scores first, and rounds their weights; only then do the registers
// of the scores become those of their tangents. While one warpgroup computes weights, the tensor
// cores work for the other.
#pragma once

#include "sm90/loader.cuh"
#include "sm90/store.cuh"
#include "sm90/weights.cuh"
#include "sm90/work.cuh"

namespace jvp_attn::sm90 {

// Where keys and values have no tangents, kKeyTangents is false, and 4 products do instead of 6.
template <class Element, int HeadDim, int Rows, int Keys, bool kKeyTangents>
struct ForwardTangent {
    using RowTile = Tile<Rows, HeadDim>;
    using KeyTile = Tile<Keys, HeadDim>;

    static constexpr int kWarpgroups = Rows / 64;  // that multiply
    static constexpr int kThreads = (1 + kWarpgroups) * kWarpgroupThreads;
    static constexpr int kRowBox = Rows, kKeyBox = Keys;

    using RowRing = Ring<2, RowTile::kBytes>;  // Q and tQ
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
            release_registers<24>();
            if (warp_index() == 0) load(params, {rows, landed}, {keys, landed});
        } else {
            claim_registers<240>();
            Attention attention{params.attention, rows, keys};
            for (Turn turn(params); turn; turn.next()) {
                const auto block = row_block<Rows>(params.attention, turn.piece());
                if (!block.is_empty()) attention.attend(block);
            }
        }
    }

private:
    DEVICE static void load(const Params& params, Loader<RowTile, 2> rows,
                            Loader<KeyTile, kSlots> keys) {
        const AttentionParams& p = params.attention;
        const TensorMaps& maps = params.maps;
        for (Turn turn(params); turn; turn.next()) {
            const auto block = row_block<Rows>(p, turn.piece());
            if (block.is_empty()) continue;
            const Sequence& sequence = block.sequence;
            rows.load(queries_of(params, p.q, maps.q, sequence, block.head), block.first_row);
            rows.load(queries_of(params, p.tq, maps.tq, sequence, block.head), block.first_row);

            const Source k = keys_of(params, p.k, maps.k, sequence, block.head_k);
            const Source v = keys_of(params, p.v, maps.v, sequence, block.head_k);
            const Source tk = keys_of(params, p.tk, maps.tk, sequence, block.head_k);
            const Source tv = keys_of(params, p.tv, maps.tv, sequence, block.head_k);
            const int end = block.seen_by_none();
            for (int first_key = 0; first_key < end; first_key += Keys) {
                keys.load(k, first_key);
                if (kKeyTangents) keys.load(tk, first_key);
                keys.load_and_clear(v, first_key);
                if (kKeyTangents) keys.load_and_clear(tv, first_key);
            }
        }
    }

    // What a warpgroup does with its rows of a block of rows.
    struct Attention {
        const AttentionParams& p;
        const RowRing& rows;
        const KeyRing& keys;
        Position<2> row_slot = {};
        Position<kSlots> key_slot = {};

        DEVICE void attend(const RowBlock<Rows>& block) {
            // Keys from `end` on are seen by no row of the block, those before `clear` by all.
            const int end = block.seen_by_none();
            const int clear = block.seen_by_all();
            const int row = (warpgroup_index() - 1) * 64;  // within the block
            const int warp_row = row + warp_index() % 4 * 16;
            const Horizon horizon{block.sequence, block.first_row + warp_row};
            const float scale = p.softmax_scale;

            const Position<2> q_slot = row_slot;
            const RowTile q = next<RowTile>(rows, row_slot);
            const Position<2> tq_slot = row_slot;
            const RowTile tq = next<RowTile>(rows, row_slot);

            OnlineSoftmax softmax;
            TangentWeights tangent_weights;
            if (end > 0) find_reference(tangent_weights, q, tq, row, horizon);
            Accumulator<HeadDim> out, tout;
#pragma unroll 1
            for (int first_key = 0; first_key < end; first_key += Keys) {
                const Position<kSlots> k_slot = key_slot;
                const KeyTile k = next<KeyTile>(keys, key_slot);
                Accumulator<Keys> scores;
                pin(scores.value);
                wgmma_fence();
                multiply_transposed<Element>(scores, q, row, k, false);
                wgmma_commit();
                wgmma_wait<0>();
                pin(scores.value);

                if (first_key + Keys > clear) horizon.replace_hidden(scores, first_key, -kInfinity);
                float rescaling[2];
                Packed<Element, Keys> weights;
                softmax.update(weights, scores, scale * kLog2E, rescaling);

                const Position<kSlots> tk_slot = key_slot;
                Accumulator<Keys> tangents;
                start_tangents(tangents, q, tq, row, k, key_slot);
                out.scale_rows(rescaling);
                tout.scale_rows(rescaling);
                tangent_weights.rescale(rescaling);

                const Position<kSlots> v_slot = key_slot;
                const KeyTile v = next<KeyTile>(keys, key_slot);
                const Position<kSlots> tv_slot = key_slot;
                KeyTile tv;
                if (kKeyTangents) tv = next<KeyTile>(keys, key_slot);
                pin(out.value);
                pin(tout.value);
                pin(weights.word);
                wgmma_fence();
                multiply<Element>(out, weights, v);
                if (kKeyTangents) multiply<Element>(tout, weights, tv);
                wgmma_commit();
                wgmma_wait<1>();
                pin(tangents.value);
                release(k_slot);
                if (kKeyTangents) release(tk_slot);

                Packed<Element, Keys> weighted;
                tangent_weights.update(weighted, weights, tangents, scale);
                pin(weighted.word);
                wgmma_fence();
                multiply<Element>(tout, weighted, v);
                wgmma_commit();
                wgmma_wait<0>();
                pin(out.value);
                pin(tout.value);
                pin(weights.word);
                pin(weighted.word);
                release(v_slot);
                if (kKeyTangents) release(tv_slot);
            }
            // All warps are done with Q and tQ: each has a part of them to store its rows through.
            named_barrier_sync(warpgroup_index(), kWarpgroupThreads);
            finish(block, warp_row, softmax, tangent_weights, out, tout, {q, warp_row});
            fence_proxy_async();
            warp_barrier();
            if (lane_index() == 0) {
                rows.release(q_slot);
                rows.release(tq_slot);
            }
        }

        // Waits for the next tile of a ring.
        template <class Tile, class Ring, class Position>
        DEVICE static Tile next(const Ring& ring, Position& at) {
            ring.wait_full(at);
            const Tile tile{ring.slot(at)};
            at.advance();
            return tile;
        }

        // One thread speaks for the warpgroup: products are done for all of it at once.
        DEVICE void release(const Position<kSlots>& at) const {
            if (thread_index() % kWarpgroupThreads == 0) keys.release(at);
        }

        // T of a tile of keys, without the softmax scale. The next tile of the ring is tK, if any.
        DEVICE void start_tangents(Accumulator<Keys>& tangents, const RowTile& q, const RowTile& tq,
                                   int row, const KeyTile& k, Position<kSlots>& key_slot) const {
            KeyTile tk;
            if (kKeyTangents) tk = next<KeyTile>(keys, key_slot);
            pin(tangents.value);
            wgmma_fence();
            multiply_transposed<Element>(tangents, tq, row, k, false);
            if (kKeyTangents) multiply_transposed<Element>(tangents, q, row, tk, true);
            wgmma_commit();
        }

        // T of the first keys, ahead of time: there are registers left for it.
        DEVICE void find_reference(TangentWeights& tangent_weights, const RowTile& q,
                                   const RowTile& tq, int row, const Horizon& horizon) const {
            Position<kSlots> ahead = key_slot;
            const KeyTile k = next<KeyTile>(keys, ahead);
            Accumulator<Keys> tangents;
            start_tangents(tangents, q, tq, row, k, ahead);
            wgmma_wait<0>();
            pin(tangents.value);
            horizon.replace_hidden(tangents, 0, 0);
            tangent_weights.set_reference(tangents, horizon, p.softmax_scale);
        }

        DEVICE void finish(const RowBlock<Rows>& block, int warp_row, const OnlineSoftmax& softmax,
                           const TangentWeights& tangent_weights, Accumulator<HeadDim>& out,
                           Accumulator<HeadDim>& tout, const Stage<Rows, HeadDim>& stage) const {
            const int first_row = block.first_row + warp_row;
            float* const lse = block.statistic(p.lse);
            float* const mu = block.statistic(p.mu);
            float normalisation[2], rounded_mean[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float sum = quad_sum(softmax.sum[half]);
                normalisation[half] = sum == 0 ? 0 : 1 / sum;  // 0 in a row that sees no key
                rounded_mean[half] =
                    quad_sum(tangent_weights.rounded_sum[half]) * normalisation[half];
                const float mean = quad_sum(tangent_weights.exact_sum[half]) * normalisation[half];

                const int row = first_row + row_in_warp(half);
                if (lane_index() % 4 == 0 && row < block.sequence.queries) {
                    global_store(lse + row, softmax.lse(half, sum, p.softmax_scale));
                    global_store(mu + row, tangent_weights.reference[half] + mean);
                }
            }
            out.scale_rows(normalisation);
            tout.scale_rows(normalisation);
#pragma unroll
            for (int i = 0; i < tout.kBlocks; ++i)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    tout.value[i][e] -= rounded_mean[e / 2] * out.value[i][e];
            store_rows<Element>(block.rows_of(p.out, p.head_dim_v),
                                block.rows_of(p.out_residual, p.head_dim_v), first_row, out, stage);
            store_rows<Element>(block.rows_of(p.tout, p.head_dim_v),
                                block.rows_of(p.tout_residual, p.head_dim_v), first_row, tout,
                                stage);
        }
    };
};

}  // namespace jvp_attn::sm90
