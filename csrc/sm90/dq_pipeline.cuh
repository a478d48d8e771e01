// The structure of the kernels of dQ (backward_dq.cuh, jvp_backward_dq.cuh): the rows of a block
// stay in shared memory; tiles of keys stream through a ring, the last keys first.
//
// The producer warp loads tiles by TMA; each consumer warpgroup computes 64 of the rows.
#pragma once

#include "common/smem.cuh"
#include "sm90/pipeline.cuh"
#include "sm90/scheduler.cuh"
#include "sm90/softmax.cuh"
#include "sm90/turns.cuh"

namespace jvp_attn::sm90 {

// Two values of each of the two rows of a thread.
struct RowPair {
    float first[2], second[2];
};

// A thread keeps RowPairs in shared memory, which saves registers: RowLse::subtrahend, and mu or,
// without tangents, lse_lo; beta and delta; with tangents the row sums of dS and of dT in its
// columns, exact and rounded.
enum class SmemSlot { softmax = 0, cotangents = 1, ds_sums = 2, dt_sums = 3 };

// OnesBytes are those of a tile of ones behind the keys.
template <class Element, int HeadDim, int Rows, int Keys, bool kJvp, int OnesBytes = 0>
struct DqPipeline {
    using RowTile = Tile<Rows, HeadDim>;
    using KeyTile = Tile<Keys, HeadDim>;
    using Scores = Accumulator<Keys>;
    using Weights = Packed<Element, Keys>;

    static constexpr int kWarpgroups = Rows / 64;  // consumers
    static constexpr int kConsumerThreads = kWarpgroups * kWarpgroupThreads;
    static constexpr int kThreads = kWarpgroupThreads + kConsumerThreads;
    static constexpr int kRowBox = Rows, kKeyBox = Keys;
    static constexpr bool kTurns = !kJvp && takes_turns(true);
    using Turn = Turns<kWarpgroups>;

    // Each slot holds one tile: Q, dO, tQ and dtO; K, tK, V and tV in as many slots as fit.
    static constexpr int kRowTiles = kJvp ? 4 : 2;
    using RowRing = Ring<kRowTiles, RowTile::kBytes>;
    static constexpr int kSmemSlotBytes = (kJvp ? 4 : 2) * sizeof(RowPair) * kConsumerThreads;
    static constexpr int kOtherBytes =
        RowRing::kBytes + OnesBytes + kSmemSlotBytes + RowRing::kBarrierBytes + 8;
    static constexpr int kSlots = (kMaxSharedBytes - kOtherBytes) / (KeyTile::kBytes + 16);
    using KeyRing = Ring<kSlots, KeyTile::kBytes>;
    static constexpr int kSharedBytes = KeyRing::kBytes + KeyRing::kBarrierBytes + kOtherBytes;

    static std::string why_not(const AttentionParams& p) { return sm90::why_not(p, HeadDim); }
    static int64_t work(const AttentionParams& p) { return RowBlock<Rows>::count(p); }

    // The layout of shared memory.
    struct Memory {
        RowRing rows;
        KeyRing keys;
        SharedAddress ones;
        SharedAddress smem_slots;
        SharedAddress tail_barrier;

        DEVICE Memory() {
            SmemAllocator smem;
            rows.slots = smem.take(RowRing::kBytes);
            keys.slots = smem.take(KeyRing::kBytes);
            ones = smem.take(OnesBytes);
            smem_slots = smem.take(kSmemSlotBytes);
            rows.barriers = smem.take(RowRing::kBarrierBytes);
            keys.barriers = smem.take(KeyRing::kBarrierBytes);
            tail_barrier = smem.take(8);
        }

        DEVICE void init() const {
            rows.init(1, kWarpgroups);
            keys.init(1, kWarpgroups);
            mbarrier_init(tail_barrier, 1);
            fence_mbarrier_init();
        }
    };

    // Each consumer warpgroup is a `Warpgroup`, a Consumer with a function differentiate(work_tile)
    // that reads the tiles in the order of `load`.
    template <class Warpgroup>
    DEVICE static void run(const Params& params, const Memory& memory) {
        if (thread_index() == 0) memory.init();
        block_barrier();
        if (warpgroup_index() == 0) {
            warpgroup_reg_dealloc<24>();
            if (warp_index() == 0)
                load(params, {memory.rows, memory.tail_barrier},
                     {memory.keys, memory.tail_barrier});
        } else {
            warpgroup_reg_alloc<240>();
            Warpgroup warpgroup{{params.attention, memory}};
            if (kTurns) Turn::begin();
#pragma unroll 1
            for (TileScheduler scheduler(params); scheduler; scheduler.next())
                warpgroup.differentiate(scheduler.work_tile());
            if (kTurns) Turn::end();
        }
    }

    // The first key of the last tile that a row of the block sees; negative if there is none.
    DEVICE static int last_tile(const RowBlock<Rows>& block) {
        return (ceil_div(block.key_end(), Keys) - 1) * Keys;
    }

private:
    DEVICE static void load(const Params& params, Loader<RowTile, kRowTiles> rows,
                            Loader<KeyTile, kSlots> keys) {
        const AttentionParams& p = params.attention;
        const TensorMaps& maps = params.maps;
#pragma unroll 1
        for (TileScheduler scheduler(params); scheduler; scheduler.next()) {
            const auto block = row_block<Rows>(p, scheduler.work_tile());
            if (block.is_empty() || block.key_end() == 0) continue;
            const auto load_rows = [&](const Tensor& x, const TensorMap& map) {
                rows.load(queries_of(params, x, map, block.sequence, block.head), block.first_row);
            };
            load_rows(p.q, maps.q);
            load_rows(p.grad_out, maps.grad_out);
            if (kJvp) load_rows(p.tq, maps.tq);
            if (kJvp) load_rows(p.grad_tout, maps.grad_tout);

            const auto source = [&](const Tensor& x, const TensorMap& map) {
                return keys_of(params, x, map, block.sequence, block.head_k);
            };
#pragma unroll 1
            for (int key = last_tile(block); key >= 0; key -= Keys) {
                keys.load_and_clear(source(p.k, maps.k), key);
                if (kJvp) keys.load_and_clear(source(p.tk, maps.tk), key);
                keys.load(source(p.v, maps.v), key);
                if (kJvp) keys.load(source(p.tv, maps.tv), key);
            }
        }
    }

public:
    // What the consumer warpgroups of both kernels do.
    struct Consumer {
        using KeySlot = PipelineState<kSlots>;

        const AttentionParams& p;
        const Memory& memory;
        int row_phase = 0;
        KeySlot at = {};

        // The first row of this warpgroup and of this warp, within the block.
        DEVICE static int row() { return (warpgroup_index() - 1) * 64; }
        DEVICE static int warp_row() { return row() + opaque(warp_index()) % 4 * 16; }

        DEVICE RowTile row_tile(int which) const { return {memory.rows.slot({which, 0})}; }

        DEVICE KeyTile tile(const KeySlot& slot) const { return {memory.keys.slot(slot)}; }

        DEVICE void wait_rows() const {
            for (int i = 0; i < kRowTiles; ++i) memory.rows.wait_full({i, row_phase});
        }

        DEVICE void release_rows() {
            for (int i = 0; i < kRowTiles; ++i) memory.rows.release_by_warpgroup({i, row_phase});
            row_phase ^= 1;
        }

        // Waits for the next tile of the ring and returns its slot.
        DEVICE KeySlot next() {
            const KeySlot slot = at;
            memory.keys.wait_full(slot);
            at.advance();
            return slot;
        }

        DEVICE void release(const KeySlot& slot) const { memory.keys.release_by_warpgroup(slot); }

        DEVICE SharedAddress address_of(SmemSlot slot) const {
            const int thread = thread_index() - kWarpgroupThreads;
            return memory.smem_slots + (static_cast<int>(slot) * kConsumerThreads + thread) * 16;
        }

        DEVICE void store_smem(SmemSlot slot, const RowPair& values) const {
            Words4 words;
            memcpy(&words, &values, sizeof words);
            shared_store_words4(address_of(slot), words);
        }

        DEVICE RowPair load_smem(SmemSlot slot) const {
            const Words4 words = shared_load_words4(address_of(slot));
            RowPair values;
            memcpy(&values, &words, sizeof words);
            return values;
        }
    };
};

// What a row of dS or dT adds up to beyond its cotangent, as a share of each key that the row sees
// in the first tile, negated: rounded rows do not sum to dlse and dmu, as they do in exact
// arithmetic, and the mean of K and tK would leak into the gradients. A row that sees any key sees
// some of these. `totals` are the sums of the rounded rows.
template <class Element, int Keys, int Rows>
DEVICE void balance_row_sums(Packed<Element, Keys>& x, const RowBlock<Rows>& block, int first_row,
                             const float (&totals)[2], const RowVector& cotangent) {
    const CausalMask causal_mask(block.sequence, first_row);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int visible = min(causal_mask.end(half), Keys);
        const float excess =
            totals[half] - value_of_row(block, cotangent, first_row + row_in_warp(half));
        const float share = visible > 0 ? -excess / visible : 0;
#pragma unroll
        for (int i = 0; i < x.kBlocks; ++i)
            x.set(i, half, column_of(i, 0) < visible ? share : 0,
                  column_of(i, 1) < visible ? share : 0);
    }
}

}  // namespace jvp_attn::sm90
