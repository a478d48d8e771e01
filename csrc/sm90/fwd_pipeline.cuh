// The structure of the forward kernels: the rows of a block stay in shared memory, and tiles of
// keys stream through a ring.
//
// The producer warp loads tiles by TMA; each consumer warpgroup computes 64 of the rows. The
// kernels are persistent: a block of threads computes one block of rows after the other.
#pragma once

#include "sm90/pipeline.cuh"
#include "sm90/scheduler.cuh"
#include "sm90/turns.cuh"

namespace jvp_attn::sm90 {

template <int HeadDim, int Rows, int Keys, int RowTiles>
struct FwdPipeline {
    using RowTile = Tile<Rows, HeadDim>;
    using KeyTile = Tile<Keys, HeadDim>;

    static constexpr int kWarpgroups = Rows / 64;  // consumers
    static constexpr int kThreads = (1 + kWarpgroups) * kWarpgroupThreads;
    static constexpr int kRowBox = Rows, kKeyBox = Keys;

    using RowRing = Ring<RowTiles, RowTile::kBytes>;
    static constexpr int kOtherBytes = RowRing::kBytes + RowRing::kBarrierBytes + 8;
    // As many slots as fit.
    static constexpr int kSlots = (kMaxSharedBytes - kOtherBytes) / (KeyTile::kBytes + 16);
    using KeyRing = Ring<kSlots, KeyTile::kBytes>;
    static constexpr int kSharedBytes = KeyRing::kBytes + KeyRing::kBarrierBytes + kOtherBytes;

    using RowLoader = Loader<RowTile, RowTiles>;
    using KeyLoader = Loader<KeyTile, kSlots>;
    using RowReader = Reader<RowTile, RowTiles>;
    using KeyReader = Reader<KeyTile, kSlots>;
    using KeySlot = PipelineState<kSlots>;
    // Barriers 1 to kWarpgroups are those of sync_warpgroup.
    using Turn = Turns<kWarpgroups, kWarpgroups + 1>;

    static std::string why_not(const AttentionParams& p) { return sm90::why_not(p, HeadDim); }
    static int64_t work(const AttentionParams& p) { return RowBlock<Rows>::count(p); }

    // A kernel has two functions: load(params, block, rows, keys), with which the producer loads
    // the tiles of a block of rows, and attend(p, work_tile, rows, keys), with which a consumer
    // warpgroup computes them, block_of(p, work_tile). attend releases all tiles of keys. If
    // kTurns, attend takes turns, as many in each warpgroup.
    template <class Kernel>
    DEVICE static void run(const Params& params) {
        const SharedAddress memory = shared_memory();
        const SharedAddress barriers = memory + RowRing::kBytes + KeyRing::kBytes;
        const RowRing rows{memory, barriers};
        const KeyRing keys{memory + RowRing::kBytes, barriers + RowRing::kBarrierBytes};
        const SharedAddress tail_barrier = keys.barriers + KeyRing::kBarrierBytes;
        if (thread_index() == 0) {
            rows.init(1, kWarpgroups * 4);
            keys.init(1, kWarpgroups);
            mbarrier_init(tail_barrier, 1);
            fence_mbarrier_init();
        }
        block_barrier();

        const AttentionParams& p = params.attention;
        if (warpgroup_index() == 0) {
            warpgroup_reg_dealloc<kWarpgroups == 2 ? 24 : 32>();
            if (warp_index() != 0) return;
            if (elect_one()) {
                prefetch_map(params.maps.q);
                prefetch_map(params.maps.k);
                prefetch_map(params.maps.v);
            }
            RowLoader row_loader{rows, tail_barrier};
            KeyLoader key_loader{keys, tail_barrier};
            for (TileScheduler scheduler(params); scheduler; scheduler.next()) {
                const auto block = block_of(p, scheduler.work_tile());
                if (!block.is_empty()) Kernel::load(params, block, row_loader, key_loader);
            }
        } else {
            warpgroup_reg_alloc<kWarpgroups == 2 ? 240 : 160>();
            if (Kernel::kTurns) Turn::begin();
            RowReader row_reader{rows};
            KeyReader key_reader{keys};
            for (TileScheduler scheduler(params); scheduler; scheduler.next()) {
                if (block_of(p, scheduler.work_tile()).is_empty()) continue;
                Kernel::attend(p, scheduler.work_tile(), row_reader, key_reader);
                // Warps also stage their output in the tiles of rows: each warp releases them.
                fence_proxy_async();
                warp_barrier();
                if (lane_index() == 0)
                    for (int slot = 0; slot < RowTiles; ++slot) rows.release({slot, 0});
            }
            if (Kernel::kTurns) Turn::end();
        }
    }

    DEVICE static RowBlock<Rows> block_of(const AttentionParams& p, int work_tile) {
        return row_block<Rows>(p, work_tile);
    }

    // The first row of this warpgroup and of this warp, within the block.
    DEVICE static int warpgroup_row() { return (warpgroup_index() - 1) * 64; }
    DEVICE static int warp_row() { return warpgroup_row() + warp_index() % 4 * 16; }

    // Waits until all warps of the warpgroup have finished their products. Then each may stage its
    // output in its part of a tile of rows.
    DEVICE static void sync_warpgroup() {
        named_barrier_sync(warpgroup_index(), kWarpgroupThreads);
    }
};

}  // namespace jvp_attn::sm90
