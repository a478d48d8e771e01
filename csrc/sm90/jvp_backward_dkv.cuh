// Backward of the forward JVP: dK, dV, dtK and dtV. sm80/backward_dkv.cuh has the equations.
//
//     Tc = T − mu      Bc = dtO Vᵀ − beta      dT = P∘Bc
//     dS = P∘(dO Vᵀ + dtO tVᵀ − delta + Bc∘Tc)
//     dV = Pᵀ dO + (P∘Tc)ᵀ dtO      dtV = Pᵀ dtO
//     dK = s (dSᵀ Q + dTᵀ tQ)       dtK = s dTᵀ Q
//
// Tiles: K, V, tK and tV are 64 x HeadDim; Q, dO, tQ and dtO are Rows x HeadDim and stream through
// a ring, those of all query heads that share the keys. Everything is transposed: rows are keys and
// columns are queries. The registers of one warpgroup cannot hold four gradients, so two share the
// keys, and each computes six of the twelve products of a tile:
//     the value warpgroup  P and Tc, which it stores in shared memory; dV and dtV
//     the key warpgroup    Bc and dO Vᵀ + dtO tVᵀ − delta, then dS and dT; dK and dtK
// In the producer warpgroup one warp loads tiles by TMA, another loads the statistics of the
// queries.
#pragma once

#include "common/smem.cuh"
#include "sm90/pipeline.cuh"
#include "sm90/query_stats.cuh"
#include "sm90/scheduler.cuh"

namespace jvp_attn::sm90 {

template <class Element, int HeadDim, int Rows, int Keys>
struct JvpBackwardDkv {
    static_assert(Keys == 64, "the keys of a warpgroup");
    using RowTile = Tile<Rows, HeadDim>;
    using KeyTile = Tile<Keys, HeadDim>;
    using Scores = Accumulator<Rows>;
    using Weights = Packed<Element, Rows>;
    using Gradient = Accumulator<HeadDim>;
    using Block = KeyBlock<Keys>;

    static constexpr int kThreads = 3 * kWarpgroupThreads;
    static constexpr int kConsumerThreads = 2 * kWarpgroupThreads;
    static constexpr int kRowBox = Rows, kKeyBox = Keys;

    // Each slot holds one tile: K, V, tK and tV; Q, dtO, tQ and dO of each stage; the statistics of
    // each stage.
    static constexpr int kStages = 2;
    using KeyRing = Ring<4, KeyTile::kBytes>;
    using QueryRing = Ring<4 * kStages, RowTile::kBytes>;
    using Stats = QueryStatsTile<Rows, true>;
    using StatsRing = Ring<kStages, Stats::kBytes>;
    static constexpr int kScoresBytes = Keys * Rows * 4;
    static constexpr int kSharedBytes = KeyRing::kBytes + QueryRing::kBytes + StatsRing::kBytes +
                                        2 * kScoresBytes + KeyRing::kBarrierBytes +
                                        QueryRing::kBarrierBytes + StatsRing::kBarrierBytes + 8;
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
            if (warp_index() == 1) load_stats(params, memory);
        } else {
            warpgroup_reg_alloc<232>();
            // The memory for P is empty before the first tile: the key warpgroup arrives once more
            // than there are tiles, and the value warpgroup waits for its last arrival at the end.
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
    // Named barriers of the two consumer warpgroups: P and Tc are in shared memory; they have been
    // read.
    enum Barrier { kPFull = 1, kPEmpty = 2 };

    // The layout of shared memory.
    struct Memory {
        KeyRing keys;
        QueryRing queries;
        StatsRing stats;
        SharedAddress exchange;
        SharedAddress tail_barrier;

        DEVICE Memory() {
            SmemAllocator smem;
            keys.slots = smem.take(KeyRing::kBytes);
            queries.slots = smem.take(QueryRing::kBytes);
            exchange = smem.take(2 * kScoresBytes);
            stats.slots = smem.take(StatsRing::kBytes);
            keys.barriers = smem.take(KeyRing::kBarrierBytes);
            queries.barriers = smem.take(QueryRing::kBarrierBytes);
            stats.barriers = smem.take(StatsRing::kBarrierBytes);
            tail_barrier = smem.take(8);
        }

        DEVICE void init() const {
            keys.init(1, 2);
            queries.init(1, 2);
            stats.init(32, kConsumerThreads / 32);
            mbarrier_init(tail_barrier, 1);
            fence_mbarrier_init();
        }

        DEVICE KeyTile k() const { return {keys.slot({0, 0})}; }
        DEVICE KeyTile v() const { return {keys.slot({1, 0})}; }
        DEVICE KeyTile tk() const { return {keys.slot({2, 0})}; }
        DEVICE KeyTile tv() const { return {keys.slot({3, 0})}; }

        // P (which = 0) and Tc (which = 1) of a thread in columns 8 block to 8 block + 7.
        DEVICE SharedAddress exchanged(int which, int block) const {
            const int thread = thread_index() % kWarpgroupThreads;
            return exchange + which * kScoresBytes + (block * kWarpgroupThreads + thread) * 16;
        }
    };

    // -----------------------------------------------------------------------------------------
    // Producers

    DEVICE static void load_tiles(const Params& params, const Memory& memory) {
        const AttentionParams& p = params.attention;
        const TensorMaps& maps = params.maps;
        Loader<KeyTile, 4> keys{memory.keys, memory.tail_barrier};
        Loader<RowTile, 4 * kStages> queries{memory.queries, memory.tail_barrier};
        for (TileScheduler scheduler(params); scheduler; scheduler.next()) {
            const Block block(p, scheduler.work_tile());
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

    DEVICE static void load_stats(const Params& params, const Memory& memory) {
        const AttentionParams& p = params.attention;
        PipelineState<kStages> at;
        for (TileScheduler scheduler(params); scheduler; scheduler.next()) {
            const Block block(p, scheduler.work_tile());
            block.template for_each_tile<Rows>([&](int head, int first_row) {
                memory.stats.wait_empty(at);
                Stats{memory.stats.slot(at)}.store(p, block.sequence, head, first_row);
                mbarrier_arrive(memory.stats.full(at));
                at.advance();
            });
        }
    }

    // -----------------------------------------------------------------------------------------
    // Consumers

    // A tile of queries, with everything that a warpgroup needs to compute it.
    struct Step {
        const AttentionParams& p;
        const Memory& memory;
        const Block& block;
        int first_row;
        PipelineState<kStages> at;

        DEVICE RowTile q() const { return tile(0); }
        DEVICE RowTile dtout() const { return tile(1); }
        DEVICE RowTile tq() const { return tile(2); }
        DEVICE RowTile dout() const { return tile(3); }

        DEVICE Stats stats() const { return {memory.stats.slot(at)}; }

        DEVICE void wait() const {
#pragma unroll
            for (int which = 0; which < 4; ++which) memory.queries.wait_full(slot(which));
            memory.stats.wait_full(at);
        }

        DEVICE void release() const {
            warp_barrier();
            if (lane_index() == 0) memory.stats.release(at);
            if (thread_index() % kWarpgroupThreads != 0) return;
#pragma unroll
            for (int which = 0; which < 4; ++which) memory.queries.release(slot(which));
        }

    private:
        DEVICE PipelineState<4 * kStages> slot(int which) const {
            return {4 * at.slot + which, at.phase};
        }

        DEVICE RowTile tile(int which) const { return {memory.queries.slot(slot(which))}; }
    };

    template <class Warpgroup>
    DEVICE static void consume(const Params& params, const Memory& memory) {
        const AttentionParams& p = params.attention;
        int key_phase = 0;
        PipelineState<kStages> at;
#pragma unroll 1
        for (TileScheduler scheduler(params); scheduler; scheduler.next()) {
            const Block block(p, scheduler.work_tile());
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
            // Computed again: to keep the block would cost registers in the loop.
            warpgroup.store(p, Block(p, opaque(scheduler.work_tile())));
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

            // Sᵀ = K Qᵀ
            Scores weights;
            const auto issue_scores = [&] {
                multiply_transposed<Element>(weights, memory.k(), 0, step.q(), false);
            };
            wgmma_group(issue_scores, weights);
            wgmma_wait_for<0>(weights);
            // P = exp(S − lse)
            exponentiate_transposed(weights, scale, step.block, step.first_row, step.stats(),
                                    [&] { return first_key_of_warp(step.block); });
            // wait until the key warpgroup has read the last P and Tc; store P
            named_barrier_sync(kPEmpty, kConsumerThreads);
            store_exchange(memory, 0, weights);
            Weights rounded;
            round_weights(rounded, weights);

            // issue Tᵀ = K tQᵀ + tK Qᵀ; then dtV += Pᵀ dtO and dV += Pᵀ dO
            Scores tangents;
            const auto issue_tangents = [&] {
                multiply_transposed<Element>(tangents, memory.k(), 0, step.tq(), false);
                multiply_transposed<Element>(tangents, memory.tk(), 0, step.q(), true);
                wgmma_commit();
                multiply<Element>(grad_tv, rounded, step.dtout());
                multiply<Element>(grad_v, rounded, step.dout());
            };
            wgmma_group(issue_tangents, tangents, rounded, grad_v, grad_tv);
            // wait for T
            wgmma_wait_for<1>(tangents);

            // Tc = T − mu and P∘Tc, while wgmma computes dtV and dV
            Weights weighted;
#pragma unroll
            for (int i = 0; i < tangents.kBlocks; ++i) {
                const QueryStats mu = step.stats().load(0, i);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
#pragma unroll
                    for (int side = 0; side < 2; ++side) {
                        float& tangent = tangents.at(i, half, side);
                        const float centred = tangent * scale - mu.value[0][2 + side];
                        // T of a hidden key may be infinite, and 0 · inf is NaN.
                        tangent = weights.at(i, half, side) == 0 ? 0 : centred;
                    }
                    weighted.set(i, half, weights.at(i, half, 0) * tangents.at(i, half, 0),
                                 weights.at(i, half, 1) * tangents.at(i, half, 1));
                }
            }
            // store Tc; the key warpgroup may read P and Tc
            store_exchange(memory, 1, tangents);
            named_barrier_arrive(kPFull, kConsumerThreads);

            // dV += (P∘Tc)ᵀ dtO
            wgmma_group([&] { multiply<Element>(grad_v, weighted, step.dtout()); }, weighted);
            wgmma_wait_for<0>(grad_v, grad_tv, rounded, weighted);
        }

        DEVICE void store(const AttentionParams& p, const Block& block) const {
            block.template store<Element>(p.grad_v, p.head_dim_v, first_key_of_warp(block), grad_v);
            block.template store<Element>(p.grad_tv, p.head_dim_v, first_key_of_warp(block),
                                          grad_tv);
        }

    private:
        DEVICE static void store_exchange(const Memory& memory, int which, const Scores& scores) {
#pragma unroll
            for (int i = 0; i < scores.kBlocks; ++i)
                shared_store_words4(memory.exchanged(which, i), scores.words(i));
        }
    };

    struct KeyWarpgroup {
        Gradient grad_k, grad_tk;

        DEVICE void add(const Step& step) {
            const Memory& memory = step.memory;

            // (dtO Vᵀ)ᵀ and (dO Vᵀ + dtO tVᵀ)ᵀ
            Scores bc, x;
            const auto issue = [&] {
                multiply_transposed<Element>(bc, memory.v(), 0, step.dtout(), false);
                wgmma_commit();
                multiply_transposed<Element>(x, memory.v(), 0, step.dout(), false);
                multiply_transposed<Element>(x, memory.tv(), 0, step.dtout(), true);
            };
            wgmma_group(issue, bc, x);
            wgmma_wait_for<0>(bc, x);

            // wait for P and Tc; dS and dT
            named_barrier_sync(kPFull, kConsumerThreads);
            Weights ds, dt;
#pragma unroll
            for (int i = 0; i < x.kBlocks; ++i) {
                const QueryStats weights = load_query_stats(memory.exchanged(0, i));
                const QueryStats tangents = load_query_stats(memory.exchanged(1, i));
                const QueryStats stats = step.stats().load(1, i);
                float s[4], t[4];
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const float b = bc.value[i][e] - stats.value[0][e % 2];
                    const float a =
                        x.value[i][e] - stats.value[0][2 + e % 2] + b * tangents.value[0][e];
                    t[e] = masked_product(weights.value[0][e], b);
                    s[e] = masked_product(weights.value[0][e], a);
                }
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    ds.set(i, half, s[2 * half], s[2 * half + 1]);
                    dt.set(i, half, t[2 * half], t[2 * half + 1]);
                }
            }
            // the value warpgroup may store the next P and Tc
            named_barrier_arrive(kPEmpty, kConsumerThreads);

            // dtK += dTᵀ Q, and dK += dSᵀ Q + dTᵀ tQ
            const auto issue_gradients = [&] {
                multiply<Element>(grad_tk, dt, step.q());
                multiply<Element>(grad_k, ds, step.q());
                multiply<Element>(grad_k, dt, step.tq());
            };
            wgmma_group(issue_gradients, ds, dt, grad_k, grad_tk);
            wgmma_wait_for<0>(grad_k, grad_tk, ds, dt);
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
