// The gradients of K and V, through the output alone: the equations of ../sm80/backward_dkv.cuh,
// which become
//
//     gV = Pᵀ gO      gK = s Sbarᵀ Q      Sbar = P∘(gO Vᵀ − delta)
//
// A block has some keys of one head at a time, and each of its warpgroups 64 of them; tiles of
// queries stream by in a ring, those of every query head that shares the keys. All is transposed:
// rows are keys, columns queries, so that P and Sbar are left factors in registers. While the
// exponentials of P are computed, the tensor cores multiply V and gO.
#pragma once

#include "sm90/key_block.cuh"
#include "sm90/limits.h"
#include "sm90/loader.cuh"
#include "sm90/ring.cuh"
#include "sm90/work.cuh"
#include "softmax.cuh"

namespace jvp_attn::sm90 {

template <class Element, int HeadDim, int Rows, int Keys>
struct BackwardDkv {
    using RowTile = Tile<Rows, HeadDim>;
    using KeyTile = Tile<Keys, HeadDim>;
    using Scores = Accumulator<Rows>;
    using Weights = Packed<Element, Rows>;
    using Gradient = Accumulator<HeadDim>;
    using Block = KeyBlock<Keys>;

    static constexpr int kConsumerThreads = Keys / 64 * kWarpgroupThreads;
    static constexpr int kThreads = kWarpgroupThreads + kConsumerThreads;
    static constexpr int kRowBox = Rows, kKeyBox = Keys;

    // In slots of one tile: K, V; Q, gO of each tile of queries; and lse and delta.
    static constexpr int kStages = 3;
    using KeyRing = Ring<2, KeyTile::kBytes>;
    using QueryRing = Ring<2 * kStages, RowTile::kBytes>;
    using StatisticsRing = Ring<kStages, 2 * Rows * 4>;
    static constexpr int kSharedBytes =
        KeyRing::kBytes + QueryRing::kBytes + StatisticsRing::kBytes + KeyRing::kBarrierBytes +
        QueryRing::kBarrierBytes + StatisticsRing::kBarrierBytes + 8;
    static_assert(kSharedBytes <= kMaxSharedBytes);

    static std::string why_not(const AttentionParams& p) { return sm90::why_not(p, HeadDim); }
    static int64_t work(const AttentionParams& p) { return Block::count(p); }

    DEVICE static void run(const Params& params) {
        const Memory memory;
        if (thread_index() == 0) memory.init();
        block_barrier();
        if (warpgroup_index() == 0) {
            release_registers<40>();
            if (warp_index() == 0)
                load_tiles(params, {memory.keys, memory.landed}, {memory.queries, memory.landed});
            if (warp_index() == 1) load_statistics(params, memory.statistics);
        } else {
            claim_registers<232>();
            Warpgroup warpgroup{params.attention, memory};
#pragma unroll 1
            for (Turn turn(params); turn; turn.next()) warpgroup.differentiate(turn.piece());
        }
    }

private:
    // What is where in shared memory.
    struct Memory {
        KeyRing keys;
        QueryRing queries;
        StatisticsRing statistics;
        SharedAddress landed;  // an mbarrier

        DEVICE Memory() {
            keys.slots = shared_memory();
            queries.slots = keys.slots + KeyRing::kBytes;
            statistics.slots = queries.slots + QueryRing::kBytes;
            keys.barriers = statistics.slots + StatisticsRing::kBytes;
            queries.barriers = keys.barriers + KeyRing::kBarrierBytes;
            statistics.barriers = queries.barriers + QueryRing::kBarrierBytes;
            landed = statistics.barriers + StatisticsRing::kBarrierBytes;
        }

        DEVICE void init() const {
            keys.init(1, kConsumerThreads / kWarpgroupThreads);
            queries.init(1, kConsumerThreads / kWarpgroupThreads);
            statistics.init(32, kConsumerThreads / 32);
            mbarrier_init(landed, 1);
            fence_mbarrier_init();
        }
    };

    DEVICE static void load_tiles(const Params& params, Loader<KeyTile, 2> keys,
                                  Loader<RowTile, 2 * kStages> queries) {
        const AttentionParams& p = params.attention;
        const TensorMaps& maps = params.maps;
#pragma unroll 1
        for (Turn turn(params); turn; turn.next()) {
            const Block block(p, turn.piece());
            if (!block.sees_queries()) continue;
            const Sequence& sequence = block.sequence;
            keys.load(keys_of(params, p.k, maps.k, sequence, block.head_k), block.first_key);
            keys.load(keys_of(params, p.v, maps.v, sequence, block.head_k), block.first_key);
            block.template for_each_tile<Rows>([&](int head, int row) {
                queries.load_and_clear(queries_of(params, p.q, maps.q, sequence, head), row);
                queries.load_and_clear(
                    queries_of(params, p.grad_out, maps.grad_out, sequence, head), row);
            });
        }
    }

    // What is known of the queries beforehand, of two at a time by each lane.
    DEVICE static void load_statistics(const Params& params, const StatisticsRing& ring) {
        const AttentionParams& p = params.attention;
        Position<kStages> at;
#pragma unroll 1
        for (Turn turn(params); turn; turn.next()) {
            const Block block(p, turn.piece());
            block.template for_each_tile<Rows>([&](int head, int first_row) {
                ring.wait_empty(at);
                for (int pair = lane_index(); pair < Rows / 2; pair += 32)
                    store_numbers(ring.slot(at) + 16 * pair, block.sequence, head,
                                  first_row + 2 * pair, p.lse, p.delta, true);
                mbarrier_arrive(ring.full(at));
                at.advance();
            });
        }
    }

    // What a warpgroup does with its keys of a block.
    struct Warpgroup {
        const AttentionParams& p;
        const Memory& memory;
        int key_phase = 0;
        Position<kStages> at = {};

        DEVICE void differentiate(int piece) {
            const Block block(p, piece);
            if (block.is_empty()) return;
            Gradient grad_k, grad_v;
            if (block.sees_queries()) {
                memory.keys.wait_full({0, key_phase});
                memory.keys.wait_full({1, key_phase});
                block.template for_each_tile<Rows>(
                    [&](int, int row) { add(grad_k, grad_v, block, row); });
                release(memory.keys, Position<2>{0, key_phase});
                release(memory.keys, Position<2>{1, key_phase});
                key_phase ^= 1;
            }
            const Block again(p, opaque(piece));
            grad_k.scale(p.softmax_scale);
            again.template store<Element>(p.grad_k, p.head_dim, first_key(again), grad_k);
            again.template store<Element>(p.grad_v, p.head_dim_v, first_key(again), grad_v);
        }

    private:
        // Of the warpgroup, within the block.
        DEVICE static int row() { return (warpgroup_index() - 1) * 64; }

        // Of the warp, within its sequence.
        DEVICE static int first_key(const Block& block) {
            return block.first_key + row() + opaque(warp_index()) % 4 * 16;
        }

        // One thread speaks for the warpgroup: products are done for all of it at once.
        template <class Ring, class Position>
        DEVICE static void release(const Ring& ring, const Position& place) {
            if (thread_index() % kWarpgroupThreads == 0) ring.release(place);
        }

        // Of the two queries of a thread among 8: lse in units of log2, and delta.
        DEVICE Numbers statistics(int i) const {
            return load_numbers(memory.statistics.slot(at) + (4 * i + lane_index() % 4) * 16);
        }

        DEVICE void add(Gradient& grad_k, Gradient& grad_v, const Block& block, int first_row) {
            const KeyTile k{memory.keys.slot({0, 0})}, v{memory.keys.slot({1, 0})};
            const Position<2 * kStages> q_at{2 * at.slot, at.phase},
                go_at{2 * at.slot + 1, at.phase};
            const RowTile q{memory.queries.slot(q_at)}, go{memory.queries.slot(go_at)};
            memory.queries.wait_full(q_at);
            memory.queries.wait_full(go_at);
            memory.statistics.wait_full(at);

            Scores weights, x;
            pin(weights.value);
            pin(x.value);
            wgmma_fence();
            multiply_transposed<Element>(weights, k, row(), q, false);
            wgmma_commit();
            multiply_transposed<Element>(x, v, row(), go, false);
            wgmma_commit();
            wgmma_wait<1>();
            pin(weights.value);
            exponentiate(weights, block, first_row);
            Weights rounded;
            round_weights(rounded, weights);

            pin(rounded.word);
            pin(grad_v.value);
            wgmma_fence();
            multiply<Element>(grad_v, rounded, go);
            wgmma_commit();
            wgmma_wait<1>();
            pin(x.value);
            Weights sbar;
#pragma unroll
            for (int i = 0; i < x.kBlocks; ++i) {
                const Numbers known = statistics(i);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    float y[2];
#pragma unroll
                    for (int side = 0; side < 2; ++side) {
                        const float weight = weights.at(i, half, side);
                        // Of a hidden key x may be infinite, and 0 · inf is NaN.
                        y[side] = weight == 0
                                      ? 0
                                      : weight * (x.at(i, half, side) - known.value[0][2 + side]);
                    }
                    sbar.set(i, half, y[0], y[1]);
                }
            }
            pin(sbar.word);
            pin(grad_k.value);
            wgmma_fence();
            multiply<Element>(grad_k, sbar, q);
            wgmma_commit();
            wgmma_wait<0>();
            pin(grad_k.value);
            pin(grad_v.value);
            pin(rounded.word);
            pin(sbar.word);

            release(memory.queries, q_at);
            release(memory.queries, go_at);
            warp_barrier();
            if (lane_index() == 0) memory.statistics.release(at);
            at.advance();
        }

        // Scores become weights; those of hidden keys are 0.
        DEVICE void exponentiate(Scores& scores, const Block& block, int first_row) const {
            const float scale = p.softmax_scale * kLog2E;
#pragma unroll
            for (int i = 0; i < scores.kBlocks; ++i) {
                const Numbers known = statistics(i);
#pragma unroll
                for (int half = 0; half < 2; ++half)
#pragma unroll
                    for (int side = 0; side < 2; ++side) {
                        float& score = scores.at(i, half, side);
                        score = score * scale - known.value[0][side];
                    }
            }
            if (block.hides_keys(first_row)) block.hide(scores, first_key(block), first_row);
#pragma unroll
            for (int i = 0; i < scores.kBlocks; ++i)
#pragma unroll
                for (int e = 0; e < 4; ++e) scores.value[i][e] = fast_exp2(scores.value[i][e]);
        }
    };
};

}  // namespace jvp_attn::sm90
