// The gradients of K, V, tK and tV, through the output and its tangent: the equations of
// ../sm80/backward_dkv.cuh.
//
// A block has 64 keys of one head at a time; tiles of queries stream by in a ring, those of every
// query head that shares the keys. All is transposed: rows are keys, columns queries. The registers
// of one warpgroup cannot hold four gradients, so two share the keys, and each does half of the
// twelve products of a tile. The value warpgroup computes P and Tc, hands them over in shared
// memory, and adds to dV and gtV; the key warpgroup meanwhile computes Bc and
// dO Vᵀ + dtO tVᵀ − delta, and then adds to dK and gtK. Of the third warpgroup one warp keeps the
// TMA busy and one brings what is known of each query.
#pragma once

#include "common/softmax.cuh"
#include "sm90/key_block.cuh"
#include "sm90/limits.h"
#include "sm90/loader.cuh"
#include "sm90/ring.cuh"
#include "sm90/work.cuh"

namespace jvp_attn::sm90 {

template <class Element, int HeadDim, int Rows, int Keys>
struct JvpBackwardDkv {
    static_assert(Keys == 64, "those of a warpgroup");
    using RowTile = Tile<Rows, HeadDim>;
    using KeyTile = Tile<Keys, HeadDim>;
    using Scores = Accumulator<Rows>;
    using Weights = Packed<Element, Rows>;
    using Gradient = Accumulator<HeadDim>;
    using Block = KeyBlock<Keys>;

    static constexpr int kThreads = 3 * kWarpgroupThreads;
    static constexpr int kRowBox = Rows, kKeyBox = Keys;

    // In slots of one tile: K, V, tK, tV; Q, dtO, tQ, dO of each tile of queries; and statistics.
    static constexpr int kStages = 2;
    using KeyRing = Ring<4, KeyTile::kBytes>;
    using QueryRing = Ring<4 * kStages, RowTile::kBytes>;
    using StatisticsRing = Ring<kStages, 4 * Rows * 4>;
    static constexpr int kScoresBytes = Keys * Rows * 4;
    static constexpr int kSharedBytes =
        KeyRing::kBytes + QueryRing::kBytes + StatisticsRing::kBytes + 2 * kScoresBytes +
        KeyRing::kBarrierBytes + QueryRing::kBarrierBytes + StatisticsRing::kBarrierBytes + 8;
    static_assert(kSharedBytes <= kMaxSharedBytes);

    static std::string why_not(const AttentionParams& p) { return sm90::why_not(p, HeadDim); }
    static int64_t work(const AttentionParams& p) { return Block::count(p); }

    DEVICE static void run(const Params& params) {
        const Memory memory;
        if (thread_index() == 0) memory.init();
        block_barrier();
        if (warpgroup_index() == 0) {
            warpgroup_reg_dealloc<40>();
            if (warp_index() == 0) load_tiles(params, memory);
            if (warp_index() == 1) load_statistics(params, memory);
        } else {
            warpgroup_reg_alloc<232>();
            // Before the first tile nothing is left to take; nobody waits for the last arrival but
            // here.
            if (warpgroup_index() == 1) {
                consume<ValueWarpgroup>(params, memory);
                named_barrier_sync(kPEmpty, kConsumerThreads);
            } else {
                named_barrier_arrive(kPEmpty, kConsumerThreads);
                consume<KeyWarpgroup>(params, memory);
            }
        }
    }

private:
    // What is where in shared memory.
    struct Memory {
        KeyRing keys;
        QueryRing queries;
        StatisticsRing statistics;
        SharedAddress exchange;
        SharedAddress tail_barrier;  // an mbarrier

        DEVICE Memory() {
            SharedAddress next = shared_memory();
            const auto take = [&](int bytes) {
                const SharedAddress start = next;
                next += bytes;
                return start;
            };
            keys.slots = take(KeyRing::kBytes);
            queries.slots = take(QueryRing::kBytes);
            exchange = take(2 * kScoresBytes);
            statistics.slots = take(StatisticsRing::kBytes);
            keys.barriers = take(KeyRing::kBarrierBytes);
            queries.barriers = take(QueryRing::kBarrierBytes);
            statistics.barriers = take(StatisticsRing::kBarrierBytes);
            tail_barrier = take(8);
        }

        DEVICE void init() const {
            keys.init(1, 2);
            queries.init(1, 2);
            statistics.init(32, kConsumerThreads / 32);
            mbarrier_init(tail_barrier, 1);
            fence_mbarrier_init();
        }

        DEVICE KeyTile k() const { return {keys.slot({0, 0})}; }
        DEVICE KeyTile v() const { return {keys.slot({1, 0})}; }
        DEVICE KeyTile tk() const { return {keys.slot({2, 0})}; }
        DEVICE KeyTile tv() const { return {keys.slot({3, 0})}; }

        // Of two successive queries, lse and mu (which = 0) or beta and delta (which = 1): four
        // float32.
        DEVICE SharedAddress statistics_of(int slot, int pair, int which) const {
            return statistics.slot({slot, 0}) + (which * Rows / 2 + pair) * 16;
        }

        // Where a thread finds P (which = 0) and Tc (which = 1) of 8 queries.
        DEVICE SharedAddress handed_over(int which, int block) const {
            const int thread = thread_index() % kWarpgroupThreads;
            return exchange + which * kScoresBytes + (block * kWarpgroupThreads + thread) * 16;
        }
    };

    // Named barriers of the two warpgroups that multiply.
    enum Barrier { kPFull = 1, kPEmpty = 2 };
    static constexpr int kConsumerThreads = 2 * kWarpgroupThreads;

    // -----------------------------------------------------------------------------------------
    // Loading

    DEVICE static void load_tiles(const Params& params, const Memory& memory) {
        const AttentionParams& p = params.attention;
        const TensorMaps& maps = params.maps;
        Loader<KeyTile, 4> keys{memory.keys, memory.tail_barrier};
        Loader<RowTile, 4 * kStages> queries{memory.queries, memory.tail_barrier};
        for (TileScheduler turn(params); turn; turn.next()) {
            const Block block(p, turn.work_tile());
            if (!block.sees_queries()) continue;
            const auto load_keys = [&](const Tensor& x, const TensorMap& map) {
                keys.load(keys_of(params, x, map, block.sequence, block.head_k), block.first_key);
            };
            load_keys(p.k, maps.k);
            load_keys(p.v, maps.v);
            load_keys(p.tk, maps.tk);
            load_keys(p.tv, maps.tv);
            block.template for_each_tile<Rows>([&](int head, int row) {
                const auto load = [&](const Tensor& x, const TensorMap& map) {
                    queries.load_and_clear(queries_of(params, x, map, block.sequence, head), row);
                };
                load(p.q, maps.q);
                load(p.grad_tout, maps.grad_tout);
                load(p.tq, maps.tq);
                load(p.grad_out, maps.grad_out);
            });
        }
    }

    // What is known of the queries beforehand, of two at a time by each lane.
    DEVICE static void load_statistics(const Params& params, const Memory& memory) {
        const AttentionParams& p = params.attention;
        Position<kStages> at;
        for (TileScheduler turn(params); turn; turn.next()) {
            const Block block(p, turn.work_tile());
            block.template for_each_tile<Rows>([&](int head, int first_row) {
                memory.statistics.wait_empty(at);
                for (int pair = lane_index(); pair < Rows / 2; pair += 32) {
                    const int row = first_row + 2 * pair;
                    store_numbers(memory.statistics_of(at.slot, pair, 0), block.sequence, head, row,
                                  p.lse, p.mu, true);
                    store_numbers(memory.statistics_of(at.slot, pair, 1), block.sequence, head, row,
                                  p.beta, p.delta, false);
                }
                mbarrier_arrive(memory.statistics.full(at));
                at.advance();
            });
        }
    }

    // -----------------------------------------------------------------------------------------
    // Multiplying

    // A tile of queries, and all that the warpgroups need to work on it.
    struct Step {
        const AttentionParams& p;
        const Memory& memory;
        const Block& block;
        int first_row;
        Position<kStages> at;

        DEVICE RowTile q() const { return tile(0); }
        DEVICE RowTile gt() const { return tile(1); }
        DEVICE RowTile tq() const { return tile(2); }
        DEVICE RowTile go() const { return tile(3); }

        // Of the two queries of a thread among 8.
        DEVICE Numbers statistics(int which, int i) const {
            return load_numbers(memory.statistics_of(at.slot, 4 * i + lane_index() % 4, which));
        }

        DEVICE void wait() const {
#pragma unroll
            for (int which = 0; which < 4; ++which) memory.queries.wait_full(place(which));
            memory.statistics.wait_full(at);
        }

        DEVICE void release() const {
            warp_barrier();
            if (lane_index() == 0) memory.statistics.release(at);
            if (thread_index() % kWarpgroupThreads != 0) return;
#pragma unroll
            for (int which = 0; which < 4; ++which) memory.queries.release(place(which));
        }

    private:
        DEVICE Position<4 * kStages> place(int which) const {
            return {4 * at.slot + which, at.phase};
        }

        DEVICE RowTile tile(int which) const { return {memory.queries.slot(place(which))}; }
    };

    template <class Warpgroup>
    DEVICE static void consume(const Params& params, const Memory& memory) {
        const AttentionParams& p = params.attention;
        int key_phase = 0;
        Position<kStages> at;
#pragma unroll 1
        for (TileScheduler turn(params); turn; turn.next()) {
            const Block block(p, turn.work_tile());
            if (block.is_empty()) continue;
            Warpgroup warpgroup;
            if (block.sees_queries()) {
                for (int which = 0; which < 4; ++which) memory.keys.wait_full({which, key_phase});
                block.template for_each_tile<Rows>([&](int, int row) {
                    const Step step{p, memory, block, row, at};
                    step.wait();
                    warpgroup.add(step);
                    step.release();
                    at.advance();
                });
                if (thread_index() % kWarpgroupThreads == 0)
                    for (int which = 0; which < 4; ++which) memory.keys.release({which, key_phase});
                key_phase ^= 1;
            }
            warpgroup.store(p, Block(p, opaque(turn.work_tile())));
        }
    }

    DEVICE static int first_key_of_warp(const Block& block) {
        return block.first_key + opaque(warp_index()) % 4 * 16;
    }

    struct ValueWarpgroup {
        Gradient grad_v, grad_tv;

        DEVICE void add(const Step& step) {
            const Memory& memory = step.memory;
            const float scale = step.p.softmax_scale;

            Scores weights;
            warpgroup_fence_operand(weights.value);
            wgmma_fence();
            multiply_transposed<Element>(weights, memory.k(), 0, step.q(), false);
            wgmma_commit();
            wgmma_wait<0>();
            warpgroup_fence_operand(weights.value);
            exponentiate(weights, step);
            named_barrier_sync(kPEmpty, kConsumerThreads);
            hand_over(memory, 0, weights);
            Weights rounded;
            round_weights(rounded, weights);

            Scores tangents;
            warpgroup_fence_operand(tangents.value);
            warpgroup_fence_operand(rounded.word);
            warpgroup_fence_operand(grad_v.value);
            warpgroup_fence_operand(grad_tv.value);
            wgmma_fence();
            multiply_transposed<Element>(tangents, memory.k(), 0, step.tq(), false);
            multiply_transposed<Element>(tangents, memory.tk(), 0, step.q(), true);
            wgmma_commit();
            multiply<Element>(grad_tv, rounded, step.gt());
            multiply<Element>(grad_v, rounded, step.go());
            wgmma_commit();
            wgmma_wait<1>();
            warpgroup_fence_operand(tangents.value);

            Weights weighted;
#pragma unroll
            for (int i = 0; i < tangents.kBlocks; ++i) {
                const Numbers known = step.statistics(0, i);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
#pragma unroll
                    for (int side = 0; side < 2; ++side) {
                        float& tangent = tangents.at(i, half, side);
                        const float centred = tangent * scale - known.value[0][2 + side];
                        // Of a hidden key it may be infinite, and 0 · inf is NaN.
                        tangent = weights.at(i, half, side) == 0 ? 0 : centred;
                    }
                    weighted.set(i, half, weights.at(i, half, 0) * tangents.at(i, half, 0),
                                 weights.at(i, half, 1) * tangents.at(i, half, 1));
                }
            }
            hand_over(memory, 1, tangents);
            named_barrier_arrive(kPFull, kConsumerThreads);

            warpgroup_fence_operand(weighted.word);
            wgmma_fence();
            multiply<Element>(grad_v, weighted, step.gt());
            wgmma_commit();
            wgmma_wait<0>();
            warpgroup_fence_operand(grad_v.value);
            warpgroup_fence_operand(grad_tv.value);
            warpgroup_fence_operand(rounded.word);
            warpgroup_fence_operand(weighted.word);
        }

        DEVICE void store(const AttentionParams& p, const Block& block) const {
            block.template store<Element>(p.grad_v, p.head_dim_v, first_key_of_warp(block), grad_v);
            block.template store<Element>(p.grad_tv, p.head_dim_v, first_key_of_warp(block),
                                          grad_tv);
        }

    private:
        // Scores become weights; those of hidden keys are 0.
        DEVICE static void exponentiate(Scores& scores, const Step& step) {
            const float scale = step.p.softmax_scale * kLog2E;
#pragma unroll
            for (int i = 0; i < scores.kBlocks; ++i) {
                const Numbers known = step.statistics(0, i);
#pragma unroll
                for (int half = 0; half < 2; ++half)
#pragma unroll
                    for (int side = 0; side < 2; ++side) {
                        float& score = scores.at(i, half, side);
                        score = score * scale - known.value[0][side];
                    }
            }
            if (step.block.hides_keys(step.first_row))
                step.block.hide(scores, first_key_of_warp(step.block), step.first_row);
#pragma unroll
            for (int i = 0; i < scores.kBlocks; ++i)
#pragma unroll
                for (int e = 0; e < 4; ++e) scores.value[i][e] = fast_exp2(scores.value[i][e]);
        }

        DEVICE static void hand_over(const Memory& memory, int which, const Scores& scores) {
#pragma unroll
            for (int i = 0; i < scores.kBlocks; ++i)
                shared_store_words4(memory.handed_over(which, i), scores.words(i));
        }
    };

    struct KeyWarpgroup {
        Gradient grad_k, grad_tk;

        DEVICE void add(const Step& step) {
            const Memory& memory = step.memory;

            Scores bc, x;
            warpgroup_fence_operand(bc.value);
            warpgroup_fence_operand(x.value);
            wgmma_fence();
            multiply_transposed<Element>(bc, memory.v(), 0, step.gt(), false);
            wgmma_commit();
            multiply_transposed<Element>(x, memory.v(), 0, step.go(), false);
            multiply_transposed<Element>(x, memory.tv(), 0, step.gt(), true);
            wgmma_commit();
            wgmma_wait<0>();
            warpgroup_fence_operand(bc.value);
            warpgroup_fence_operand(x.value);

            named_barrier_sync(kPFull, kConsumerThreads);
            Weights ds, dt;
#pragma unroll
            for (int i = 0; i < x.kBlocks; ++i) {
                const Numbers weights = load_numbers(memory.handed_over(0, i));
                const Numbers tangents = load_numbers(memory.handed_over(1, i));
                const Numbers known = step.statistics(1, i);
                float s[4], t[4];
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const float b = bc.value[i][e] - known.value[0][e % 2];
                    const float a =
                        x.value[i][e] - known.value[0][2 + e % 2] + b * tangents.value[0][e];
                    // Where a weight is 0 these may be infinite, and 0 · inf is NaN.
                    t[e] = weights.value[0][e] == 0 ? 0 : weights.value[0][e] * b;
                    s[e] = weights.value[0][e] == 0 ? 0 : weights.value[0][e] * a;
                }
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    ds.set(i, half, s[2 * half], s[2 * half + 1]);
                    dt.set(i, half, t[2 * half], t[2 * half + 1]);
                }
            }
            named_barrier_arrive(kPEmpty, kConsumerThreads);

            warpgroup_fence_operand(ds.word);
            warpgroup_fence_operand(dt.word);
            warpgroup_fence_operand(grad_k.value);
            warpgroup_fence_operand(grad_tk.value);
            wgmma_fence();
            multiply<Element>(grad_tk, dt, step.q());
            multiply<Element>(grad_k, ds, step.q());
            multiply<Element>(grad_k, dt, step.tq());
            wgmma_commit();
            wgmma_wait<0>();
            warpgroup_fence_operand(grad_k.value);
            warpgroup_fence_operand(grad_tk.value);
            warpgroup_fence_operand(ds.word);
            warpgroup_fence_operand(dt.word);
        }

        DEVICE void store(const AttentionParams& p, const Block& block) {
            grad_k.scale(p.softmax_scale);
            grad_tk.scale(p.softmax_scale);
            block.template store<Element>(p.grad_k, p.head_dim, first_key_of_warp(block), grad_k);
            block.template store<Element>(p.grad_tk, p.head_dim, first_key_of_warp(block), grad_tk);
        }
    };
};

}  // namespace jvp_attn::sm90
