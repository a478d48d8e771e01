// The TMA pipeline: a ring of slots in shared memory, which a producer warp fills with tiles by TMA
// and consumer warpgroups read and release.
//
// Each slot has two mbarriers: a phase of `full` ends when the tile has arrived, a phase of `empty`
// when all consumers have released it.
#pragma once

#include "common/seqlen.cuh"
#include "sm90/params.cuh"
#include "sm90/tile.cuh"

namespace jvp_attn::sm90 {

// ---------------------------------------------------------------------------------------------
// The ring

// A slot, and the phase of its mbarriers, which alternates from round to round.
template <int Slots>
struct PipelineState {
    int slot = 0;
    int phase = 0;

    DEVICE void advance() {
        if (++slot == Slots) {
            slot = 0;
            phase ^= 1;
        }
    }
};

template <int Slots, int SlotBytes>
struct Ring {
    static constexpr int kBarrierBytes = 16 * Slots;
    static constexpr int kBytes = Slots * SlotBytes;
    using State = PipelineState<Slots>;

    SharedAddress slots, barriers;

    // One thread calls this, before any other thread uses the ring.
    DEVICE void init(int producers, int consumers) const {
        for (int slot = 0; slot < Slots; ++slot) {
            mbarrier_init(full({slot, 0}), producers);
            mbarrier_init(empty({slot, 0}), consumers);
        }
    }

    DEVICE SharedAddress slot(const State& at) const { return slots + at.slot * SlotBytes; }

    DEVICE SharedAddress full(const State& at) const { return barriers + 16 * at.slot; }

    DEVICE void wait_full(const State& at) const { mbarrier_wait(full(at), at.phase); }

    // Returns at once in the first round, when all slots are empty.
    DEVICE void wait_empty(const State& at) const { mbarrier_wait(empty(at), at.phase ^ 1); }

    DEVICE void release(const State& at) const { mbarrier_arrive(empty(at)); }

    // One elected thread arrives for the warpgroup, whose products all finish together.
    DEVICE void release_by_warpgroup(const State& at) const {
        if (thread_index() % kWarpgroupThreads == 0) release(at);
    }

    // The same, not before `value` is known: ptxas moves no wgmma_wait that follows past it.
    DEVICE void release_by_warpgroup_after(float value, const State& at) const {
        if (thread_index() % kWarpgroupThreads == 0) mbarrier_arrive(known_after(value, empty(at)));
    }

private:
    DEVICE SharedAddress empty(const State& at) const { return barriers + 16 * at.slot + 8; }
};

// ---------------------------------------------------------------------------------------------
// The producer

// The rows of one head of one sequence, as the TMA addresses them.
struct TmaSource {
    const TensorMap& map;
    int first_row, head, batch;
    int end;  // rows from here on are not part of the sequence
};

DEVICE TmaSource queries_of(const Params& params, const Tensor& x, const TensorMap& map,
                            const SeqlenInfo& sequence, int head) {
    const bool packed = params.attention.cu_seqlens_q;
    return {x.data ? map : params.maps.q,
            x.data ? static_cast<int>(sequence.first_query) : kOutOfBounds, head,
            packed ? 0 : sequence.batch, packed ? sequence.queries : kOutOfBounds};
}

DEVICE TmaSource keys_of(const Params& params, const Tensor& x, const TensorMap& map,
                         const SeqlenInfo& sequence, int head) {
    const bool packed = params.attention.cu_seqlens_k;
    const bool padded = params.attention.seqused_k;
    return {x.data ? map : params.maps.k,
            x.data ? static_cast<int>(sequence.first_key) : kOutOfBounds, head,
            packed ? 0 : sequence.batch, packed || padded ? sequence.keys : kOutOfBounds};
}

// One thread starts to load a tile from `row` of the source on; `full` expects the tile's bytes.
template <int Rows, int Columns>
DEVICE void load_tile(const Tile<Rows, Columns>& tile, const TmaSource& source, int row,
                      SharedAddress full) {
#pragma unroll
    for (int panel = 0; panel < tile.kPanels; ++panel)
        tma_load_4d(tile.base + panel * tile.kPanelBytes, source.map, full, panel * kPanelColumns,
                    source.first_row + row, source.head, source.batch);
}

// A warp zeroes the rows of a tile from `row` on.
template <int Rows, int Columns>
DEVICE void clear_rows(const Tile<Rows, Columns>& tile, int row) {
    constexpr int kChunks = 8 * tile.kPanels;
    for (int i = row * kChunks + lane_index(); i < Rows * kChunks; i += 32)
        shared_store_words4(tile.chunk(i / kChunks, i % kChunks), {});
}

// Fills a ring with tiles. All lanes of the producer warp call it, and one elected lane loads.
template <class Tile, int Slots>
struct Loader {
    const Ring<Slots, Tile::kBytes>& ring;
    SharedAddress tail_barrier;  // the mbarrier on which load_and_clear waits for TMA
    PipelineState<Slots> at = {};
    int tail_phase = 0;

    // Loads the rows of a source from `row` on into the next slot.
    DEVICE void load(const TmaSource& source, int row) {
        ring.wait_empty(at);
        fill(source, row, ring.full(at));
        at.advance();
    }

    // Also zeroes the rows beyond the source. The TMA zero-fills only beyond the tensor: after the
    // end of a sequence it reads the next one, or padding with arbitrary values.
    DEVICE void load_and_clear(const TmaSource& source, int row) {
        if (row + Tile::kRows <= source.end) return load(source, row);
        ring.wait_empty(at);
        fill(source, row, tail_barrier);
        mbarrier_wait(tail_barrier, tail_phase);
        tail_phase ^= 1;
        clear_rows(Tile{ring.slot(at)}, source.end - row);
        fence_proxy_async();
        warp_barrier();
        if (elect_one()) mbarrier_arrive(ring.full(at));
        at.advance();
    }

private:
    DEVICE void fill(const TmaSource& source, int row, SharedAddress barrier) {
        if (elect_one()) {
            mbarrier_arrive_expect(barrier, Tile::kBytes);
            load_tile(Tile{ring.slot(at)}, source, row, barrier);
        }
        warp_barrier();
    }
};

// ---------------------------------------------------------------------------------------------
// The consumer

// Reads the tiles of a ring in order, for one warpgroup.
template <class Tile, int Slots>
struct Reader {
    const Ring<Slots, Tile::kBytes>& ring;
    PipelineState<Slots> at = {};

    // Waits for the next tile.
    DEVICE Tile next() {
        ring.wait_full(at);
        const Tile tile{warp_uniform(ring.slot(at))};
        at.advance();
        return tile;
    }

    DEVICE void release(const PipelineState<Slots>& slot) const { ring.release_by_warpgroup(slot); }

    DEVICE void release_after(float value, const PipelineState<Slots>& slot) const {
        ring.release_by_warpgroup_after(value, slot);
    }
};

}  // namespace jvp_attn::sm90
