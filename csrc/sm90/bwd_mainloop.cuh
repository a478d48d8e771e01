// The structure of the kernels for dK and dV without tangents (backward_dkv.cuh, backward.cuh): K
// and V of a block of keys stay in shared memory; tiles of Q and dO stream through a ring, those of
// all query heads that share the keys.
//
// One producer warp loads tiles by TMA, another loads lse and delta; each consumer warpgroup
// computes 64 of the keys. Everything is transposed: rows are keys and columns are queries, so that
// Pᵀ and dSᵀ are left factors in registers.
#pragma once

#include "common/smem.cuh"
#include "sm90/pipeline.cuh"
#include "sm90/query_stats.cuh"
#include "sm90/scheduler.cuh"

namespace jvp_attn::sm90 {

// The memory and the producers. The first tile of queries begins at a multiple of RowStep.
template <int HeadDim, int Rows, int Keys, int RowStep>
struct BwdPipeline {
    using RowTile = Tile<Rows, HeadDim>;
    using KeyTile = Tile<Keys, HeadDim>;
    using Block = KeyBlock<Keys>;

    static constexpr int kWarpgroups = Keys / 64;  // consumers
    static constexpr int kConsumerThreads = kWarpgroups * kWarpgroupThreads;
    static constexpr int kThreads = kWarpgroupThreads + kConsumerThreads;
    static constexpr int kRowBox = Rows, kKeyBox = Keys;

    // Each slot holds one tile: K and V; Q and dO of each stage; the statistics of each stage.
    static constexpr int kStages = 3;
    using KeyRing = Ring<2, KeyTile::kBytes>;
    using QueryRing = Ring<2 * kStages, RowTile::kBytes>;
    using Stats = QueryStatsTile<Rows, false>;
    using StatsRing = Ring<kStages, Stats::kBytes>;
    static constexpr int kPipelineBytes = KeyRing::kBytes + QueryRing::kBytes + StatsRing::kBytes +
                                          KeyRing::kBarrierBytes + QueryRing::kBarrierBytes +
                                          StatsRing::kBarrierBytes + 16;

    static std::string why_not(const AttentionParams& p) { return sm90::why_not(p, HeadDim); }
    static int64_t work(const AttentionParams& p) { return Block::count(p); }

    // The layout of shared memory.
    struct Memory {
        KeyRing keys;
        QueryRing queries;
        StatsRing stats;
        SharedAddress keys_tail_barrier, queries_tail_barrier;

        DEVICE Memory() {
            SmemAllocator smem;
            keys.slots = smem.take(KeyRing::kBytes);
            queries.slots = smem.take(QueryRing::kBytes);
            stats.slots = smem.take(StatsRing::kBytes);
            keys.barriers = smem.take(KeyRing::kBarrierBytes);
            queries.barriers = smem.take(QueryRing::kBarrierBytes);
            stats.barriers = smem.take(StatsRing::kBarrierBytes);
            keys_tail_barrier = smem.take(8);
            queries_tail_barrier = smem.take(8);
        }

        DEVICE void init() const {
            keys.init(1, kWarpgroups);
            queries.init(1, kWarpgroups);
            stats.init(32, kConsumerThreads / 32);
            mbarrier_init(keys_tail_barrier, 1);
            mbarrier_init(queries_tail_barrier, 1);
            fence_mbarrier_init();
        }
    };

    // The consumer warpgroups call `consume` with each work tile.
    template <class Function>
    DEVICE static void run(const Params& params, const Memory& memory, Function consume) {
        if (thread_index() == 0) memory.init();
        block_barrier();
        if (warpgroup_index() == 0) {
            warpgroup_reg_dealloc<40>();
            if (warp_index() == 0)
                load_tiles(params, {memory.keys, memory.keys_tail_barrier},
                           {memory.queries, memory.queries_tail_barrier});
            if (warp_index() == 1) load_stats(params, memory.stats);
        } else {
            warpgroup_reg_alloc<232>();
#pragma unroll 1
            for (TileScheduler scheduler(params); scheduler; scheduler.next())
                consume(scheduler.work_tile());
        }
    }

private:
    DEVICE static void load_tiles(const Params& params, Loader<KeyTile, 2> keys,
                                  Loader<RowTile, 2 * kStages> queries) {
        const AttentionParams& p = params.attention;
        const TensorMaps& maps = params.maps;
#pragma unroll 1
        for (TileScheduler scheduler(params); scheduler; scheduler.next()) {
            const Block block(p, scheduler.work_tile());
            if (!block.sees_queries()) continue;
            const SeqlenInfo& sequence = block.sequence;
            // dQ multiplies all rows of K, so those beyond the sequence are zero.
            keys.load_and_clear(keys_of(params, p.k, maps.k, sequence, block.head_k),
                                block.first_key);
            keys.load(keys_of(params, p.v, maps.v, sequence, block.head_k), block.first_key);
            block.template for_each_tile<Rows, RowStep>([&](int head, int row) {
                queries.load_and_clear(queries_of(params, p.q, maps.q, sequence, head), row);
                queries.load_and_clear(
                    queries_of(params, p.grad_out, maps.grad_out, sequence, head), row);
            });
        }
    }

    DEVICE static void load_stats(const Params& params, const StatsRing& ring) {
        const AttentionParams& p = params.attention;
        PipelineState<kStages> at;
#pragma unroll 1
        for (TileScheduler scheduler(params); scheduler; scheduler.next()) {
            const Block block(p, scheduler.work_tile());
            block.template for_each_tile<Rows, RowStep>([&](int head, int first_row) {
                ring.wait_empty(at);
                Stats{ring.slot(at)}.store(p, block.sequence, head, first_row);
                mbarrier_arrive(ring.full(at));
                at.advance();
            });
        }
    }
};

// What a consumer warpgroup computes for each tile of queries, without the products of dS.
template <class Element, int HeadDim, int Rows, int Keys, int RowStep>
struct BwdMainloop : BwdPipeline<HeadDim, Rows, Keys, RowStep> {
    using Pipeline = BwdPipeline<HeadDim, Rows, Keys, RowStep>;
    using typename Pipeline::Block, typename Pipeline::KeyTile, typename Pipeline::Memory;
    using typename Pipeline::RowTile;
    using Scores = Accumulator<Rows>;
    using Weights = Packed<Element, Rows>;
    using Gradient = Accumulator<HeadDim>;

    // The warpgroup of 64 keys, and its position in the rings.
    struct Warpgroup {
        const AttentionParams& p;
        const Memory& memory;
        int key_phase = 0;
        PipelineState<Pipeline::kStages> at = {};

        // The first key of the warpgroup, within the block.
        DEVICE static int row() { return (warpgroup_index() - 1) * 64; }

        DEVICE KeyTile k() const { return {memory.keys.slot({0, 0})}; }
        DEVICE RowTile q() const { return {memory.queries.slot({2 * at.slot, 0})}; }

        // Calls add(grad_k, grad_v, block, head, first_row) for each tile of queries, which adds to
        // the gradients; then stores these.
        template <class Add>
        DEVICE void differentiate(int work_tile, const Add& add) {
            const Block block(p, work_tile);
            if (block.is_empty()) return;
            Gradient grad_k, grad_v;
            if (block.sees_queries()) {
                // wait for K and V
                memory.keys.wait_full({0, key_phase});
                memory.keys.wait_full({1, key_phase});
                block.template for_each_tile<Rows, RowStep>(
                    [&](int head, int first_row) { add(grad_k, grad_v, block, head, first_row); });
                memory.keys.release_by_warpgroup({0, key_phase});
                memory.keys.release_by_warpgroup({1, key_phase});
                key_phase ^= 1;
            }
            // Computed again: to keep the block would cost registers in the loop.
            const Block again(p, opaque(work_tile));
            grad_k.scale(p.softmax_scale);
            again.template store<Element>(p.grad_k, p.head_dim, first_key(again), grad_k);
            again.template store<Element>(p.grad_v, p.head_dim_v, first_key(again), grad_v);
        }

        // Computes dS = P∘(dO Vᵀ − delta) of the next tile of queries, rounded, and issues
        // dV += Pᵀ dO, which reads `rounded` and is still in flight on return.
        DEVICE void compute_ds(Weights& ds, Weights& rounded, Gradient& grad_v, const Block& block,
                               int first_row) const {
            // wait for Q, dO, lse and delta
            const KeyTile v{memory.keys.slot({1, 0})};
            const RowTile dout{memory.queries.slot({2 * at.slot + 1, 0})};
            memory.queries.wait_full({2 * at.slot, at.phase});
            memory.queries.wait_full({2 * at.slot + 1, at.phase});
            memory.stats.wait_full(at);

            // issue Sᵀ = K Qᵀ, then dPᵀ = V dOᵀ
            Scores weights, dp;
            const auto issue = [&] {
                multiply_transposed<Element>(weights, k(), row(), q(), false);
                wgmma_commit();
                multiply_transposed<Element>(dp, v, row(), dout, false);
            };
            wgmma_group(issue, weights, dp);
            // wait for S; P = exp(S − lse), while wgmma computes dP
            wgmma_wait_for<1>(weights);
            const typename Pipeline::Stats stats{memory.stats.slot(at)};
            exponentiate_transposed(weights, p.softmax_scale, block, first_row, stats,
                                    [&] { return first_key(block); });
            round_weights(rounded, weights);

            // issue dV += Pᵀ dO
            wgmma_group([&] { multiply<Element>(grad_v, rounded, dout); }, rounded, grad_v);
            // wait for dP; dS = P∘(dP − delta)
            wgmma_wait_for<1>(dp);
#pragma unroll
            for (int i = 0; i < dp.kBlocks; ++i) {
                const QueryStats delta = stats.load(0, i);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    ds.set(i, half,
                           masked_product(weights.at(i, half, 0),
                                          dp.at(i, half, 0) - delta.value[0][2]),
                           masked_product(weights.at(i, half, 1),
                                          dp.at(i, half, 1) - delta.value[0][3]));
                }
            }
        }

        // Waits for all products of the tile of queries and releases it.
        DEVICE void leave_tile(Gradient& grad_k, Gradient& grad_v, Weights& rounded, Weights& ds) {
            wgmma_wait_for<0>(grad_k, grad_v, rounded, ds);
            memory.queries.release_by_warpgroup({2 * at.slot, at.phase});
            memory.queries.release_by_warpgroup({2 * at.slot + 1, at.phase});
            warp_barrier();
            if (lane_index() == 0) memory.stats.release(at);
            at.advance();
        }

    private:
        // The first key of the warp.
        DEVICE static int first_key(const Block& block) {
            return block.first_key + row() + opaque(warp_index()) % 4 * 16;
        }
    };
};

}  // namespace jvp_attn::sm90
