// What the kernels of dK and dV share, through the output alone: the keys and values of a block
// stay in shared memory, tiles of Q and dO stream by in a ring, those of every query head that
// shares the keys.
//
// One warp loads tiles, another brings lse and delta; each of the other warpgroups has 64 of the
// keys.
#pragma once

#include "sm90/key_block.cuh"
#include "sm90/limits.h"
#include "sm90/loader.cuh"
#include "sm90/ring.cuh"
#include "sm90/work.cuh"

namespace jvp_attn::sm90 {

// Tiles of queries begin at multiples of RowStep.
template <int HeadDim, int Rows, int Keys, int RowStep>
struct BwdPipeline {
    using RowTile = Tile<Rows, HeadDim>;
    using KeyTile = Tile<Keys, HeadDim>;
    using Block = KeyBlock<Keys>;

    static constexpr int kWarpgroups = Keys / 64;  // that multiply
    static constexpr int kConsumerThreads = kWarpgroups * kWarpgroupThreads;
    static constexpr int kThreads = kWarpgroupThreads + kConsumerThreads;
    static constexpr int kRowBox = Rows, kKeyBox = Keys;

    // In slots of one tile: K, V; Q, dO of each tile of queries; and lse and delta.
    static constexpr int kStages = 3;
    using KeyRing = Ring<2, KeyTile::kBytes>;
    using QueryRing = Ring<2 * kStages, RowTile::kBytes>;
    using StatisticsRing = Ring<kStages, 2 * Rows * 4>;
    static constexpr int kStreamBytes =
        KeyRing::kBytes + QueryRing::kBytes + StatisticsRing::kBytes + KeyRing::kBarrierBytes +
        QueryRing::kBarrierBytes + StatisticsRing::kBarrierBytes + 16;

    static std::string why_not(const AttentionParams& p) { return sm90::why_not(p, HeadDim); }
    static int64_t work(const AttentionParams& p) { return Block::count(p); }

    // What is where in shared memory.
    struct Memory {
        KeyRing keys;
        QueryRing queries;
        StatisticsRing statistics;
        SharedAddress keys_landed, queries_landed;  // mbarriers

        DEVICE Memory() {
            keys.slots = shared_memory();
            queries.slots = keys.slots + KeyRing::kBytes;
            statistics.slots = queries.slots + QueryRing::kBytes;
            keys.barriers = statistics.slots + StatisticsRing::kBytes;
            queries.barriers = keys.barriers + KeyRing::kBarrierBytes;
            statistics.barriers = queries.barriers + QueryRing::kBarrierBytes;
            keys_landed = statistics.barriers + StatisticsRing::kBarrierBytes;
            queries_landed = keys_landed + 8;
        }

        DEVICE void init() const {
            keys.init(1, kWarpgroups);
            queries.init(1, kWarpgroups);
            statistics.init(32, kConsumerThreads / 32);
            mbarrier_init(keys_landed, 1);
            mbarrier_init(queries_landed, 1);
            fence_mbarrier_init();
        }
    };

    // `differentiate` is called with each work_tile of work, by the warpgroups that multiply.
    template <class Function>
    DEVICE static void run(const Params& params, const Memory& memory, Function differentiate) {
        if (thread_index() == 0) memory.init();
        block_barrier();
        if (warpgroup_index() == 0) {
            warpgroup_reg_dealloc<40>();
            if (warp_index() == 0)
                load_tiles(params, {memory.keys, memory.keys_landed},
                           {memory.queries, memory.queries_landed});
            if (warp_index() == 1) load_statistics(params, memory.statistics);
        } else {
            warpgroup_reg_alloc<232>();
#pragma unroll 1
            for (TileScheduler turn(params); turn; turn.next()) differentiate(turn.work_tile());
        }
    }

private:
    DEVICE static void load_tiles(const Params& params, Loader<KeyTile, 2> keys,
                                  Loader<RowTile, 2 * kStages> queries) {
        const AttentionParams& p = params.attention;
        const TensorMaps& maps = params.maps;
#pragma unroll 1
        for (TileScheduler turn(params); turn; turn.next()) {
            const Block block(p, turn.work_tile());
            if (!block.sees_queries()) continue;
            const SeqlenInfo& sequence = block.sequence;
            // dQ is a product with all rows of K.
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

    // What is known of the queries beforehand, of two at a time by each lane.
    DEVICE static void load_statistics(const Params& params, const StatisticsRing& ring) {
        const AttentionParams& p = params.attention;
        Position<kStages> at;
#pragma unroll 1
        for (TileScheduler turn(params); turn; turn.next()) {
            const Block block(p, turn.work_tile());
            block.template for_each_tile<Rows, RowStep>([&](int head, int first_row) {
                ring.wait_empty(at);
                for (int pair = lane_index(); pair < Rows / 2; pair += 32)
                    store_numbers(ring.slot(at) + 16 * pair, block.sequence, head,
                                  first_row + 2 * pair, p.lse, p.delta, true);
                mbarrier_arrive(ring.full(at));
                at.advance();
            });
        }
    }
};

}  // namespace jvp_attn::sm90
