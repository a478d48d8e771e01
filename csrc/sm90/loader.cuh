// The warp of a block that keeps the TMA busy.
#pragma once

#include "common/seqlen.cuh"
#include "params.h"
#include "sm90/limits.h"
#include "sm90/params.cuh"
#include "sm90/ring.cuh"

namespace jvp_attn::sm90 {

// Where the TMA finds the rows of one head of one sequence.
struct Source {
    const TensorMap& map;
    int first_row, head, batch;
    int end;  // from here on it would load rows that do not belong to them
};

DEVICE Source queries_of(const Params& params, const Tensor& x, const TensorMap& map,
                         const SeqlenInfo& sequence, int head) {
    const bool packed = params.attention.cu_seqlens_q;
    return {x.data ? map : params.maps.q, x.data ? static_cast<int>(sequence.first_query) : kBeyond,
            head, packed ? 0 : sequence.batch, packed ? sequence.queries : kBeyond};
}

DEVICE Source keys_of(const Params& params, const Tensor& x, const TensorMap& map,
                      const SeqlenInfo& sequence, int head) {
    const bool packed = params.attention.cu_seqlens_k;
    const bool padded = params.attention.seqused_k;
    return {x.data ? map : params.maps.k, x.data ? static_cast<int>(sequence.first_key) : kBeyond,
            head, packed ? 0 : sequence.batch, packed || padded ? sequence.keys : kBeyond};
}

// Starts to fill a tile with the rows of a source from `row` on. By one thread; `full` expects the
// tile's bytes.
template <int Rows, int Columns>
DEVICE void load_tile(const Tile<Rows, Columns>& tile, const Source& source, int row,
                      SharedAddress full) {
#pragma unroll
    for (int panel = 0; panel < tile.kPanels; ++panel)
        tma_load_4d(tile.base + panel * tile.kPanelBytes, source.map, full, panel * kPanelColumns,
                    source.first_row + row, source.head, source.batch);
}

// A warp fills the rows of a tile from `row` on with zeros.
template <int Rows, int Columns>
DEVICE void clear_rows(const Tile<Rows, Columns>& tile, int row) {
    constexpr int kChunks = 8 * tile.kPanels;
    for (int i = row * kChunks + lane_index(); i < Rows * kChunks; i += 32)
        shared_store_words4(tile.chunk(i / kChunks, i % kChunks), {});
}

// Fills the slots of a ring with tiles. All lanes of the warp call; one of them loads.
template <class Tile, int Slots>
struct Loader {
    const Ring<Slots, Tile::kBytes>& ring;
    SharedAddress tail_barrier;  // an mbarrier of its own
    Position<Slots> at = {};
    int landed_phase = 0;

    // The next tile is the rows of a source from `row` on.
    DEVICE void load(const Source& source, int row) {
        ring.wait_empty(at);
        fill(source, row, ring.full(at));
        at.advance();
    }

    // The same with zeros from the end of the source on. The TMA itself ends with the
    // tensor only: beyond a sequence there may be another one, or padding, with anything in it.
    DEVICE void load_and_clear(const Source& source, int row) {
        if (row + Tile::kRows <= source.end) return load(source, row);
        ring.wait_empty(at);
        fill(source, row, tail_barrier);
        mbarrier_wait(tail_barrier, landed_phase);
        landed_phase ^= 1;
        clear_rows(Tile{ring.slot(at)}, source.end - row);
        fence_proxy_async();
        warp_barrier();
        if (elect_one()) mbarrier_arrive(ring.full(at));
        at.advance();
    }

private:
    DEVICE void fill(const Source& source, int row, SharedAddress barrier) {
        if (elect_one()) {
            mbarrier_arrive_expect(barrier, Tile::kBytes);
            load_tile(Tile{ring.slot(at)}, source, row, barrier);
        }
        warp_barrier();
    }
};

}  // namespace jvp_attn::sm90
