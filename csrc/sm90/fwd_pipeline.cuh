// What the forward kernels share: the rows of a block stay in shared memory, tiles of keys stream
// by.
//
// One warp loads; each of the other warpgroups has 64 of the rows. The work of a launch comes in
// blocks of rows, and a block of threads takes one after the other.
#pragma once

#include "sm90/limits.h"
#include "sm90/loader.cuh"
#include "sm90/work.cuh"

namespace jvp_attn::sm90 {

// The next tiles of a ring, for one warpgroup.
template <class Tile, int Slots>
struct Reader {
    const Ring<Slots, Tile::kBytes>& ring;
    Position<Slots> at = {};

    // Waits for it.
    DEVICE Tile next() {
        ring.wait_full(at);
        const Tile tile{ring.slot(at)};
        at.advance();
        return tile;
    }

    // One thread speaks for the warpgroup: products are done for all of it at once.
    DEVICE void release(const Position<Slots>& slot) const {
        if (thread_index() % kWarpgroupThreads == 0) ring.release(slot);
    }
};

template <int HeadDim, int Rows, int Keys, int RowTiles>
struct FwdPipeline {
    using RowTile = Tile<Rows, HeadDim>;
    using KeyTile = Tile<Keys, HeadDim>;

    static constexpr int kWarpgroups = Rows / 64;  // that multiply
    static constexpr int kThreads = (1 + kWarpgroups) * kWarpgroupThreads;
    static constexpr int kRowBox = Rows, kKeyBox = Keys;

    using RowRing = Ring<RowTiles, RowTile::kBytes>;
    static constexpr int kOtherBytes = RowRing::kBytes + RowRing::kBarrierBytes + 8;
    // As many as fit in.
    static constexpr int kSlots = (kMaxSharedBytes - kOtherBytes) / (KeyTile::kBytes + 16);
    using KeyRing = Ring<kSlots, KeyTile::kBytes>;
    static constexpr int kSharedBytes = KeyRing::kBytes + KeyRing::kBarrierBytes + kOtherBytes;

    using RowLoader = Loader<RowTile, RowTiles>;
    using KeyLoader = Loader<KeyTile, kSlots>;
    using RowReader = Reader<RowTile, RowTiles>;
    using KeyReader = Reader<KeyTile, kSlots>;
    using KeySlot = Position<kSlots>;

    static std::string why_not(const AttentionParams& p) { return sm90::why_not(p, HeadDim); }
    static int64_t work(const AttentionParams& p) { return RowBlock<Rows>::count(p); }

    // A kernel has load(params, block, rows, keys), which loads the tiles of a block of rows, and
    // attend(p, block, rows, keys), which a warpgroup does with them: it releases all tiles of
    // keys.
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
            for (TileScheduler turn(params); turn; turn.next()) {
                const auto block = row_block<Rows>(p, turn.work_tile());
                if (!block.is_empty()) Kernel::load(params, block, row_loader, key_loader);
            }
        } else {
            warpgroup_reg_alloc<kWarpgroups == 2 ? 240 : 160>();
            RowReader row_reader{rows};
            KeyReader key_reader{keys};
            for (TileScheduler turn(params); turn; turn.next()) {
                const auto block = row_block<Rows>(p, turn.work_tile());
                if (block.is_empty()) continue;
                Kernel::attend(p, block, row_reader, key_reader);
                // Each warp has used all tiles of rows in its own ways.
                fence_proxy_async();
                warp_barrier();
                if (lane_index() == 0)
                    for (int slot = 0; slot < RowTiles; ++slot) rows.release({slot, 0});
            }
        }
    }

    // The rows of this warpgroup and of this warp, within the block.
    DEVICE static int warpgroup_row() { return (warpgroup_index() - 1) * 64; }
    DEVICE static int warp_row() { return warpgroup_row() + warp_index() % 4 * 16; }

    // After this barrier each warp may store its rows through its part of a tile of rows.
    DEVICE static void products_are_done() {
        named_barrier_sync(warpgroup_index(), kWarpgroupThreads);
    }
};

}  // namespace jvp_attn::sm90
