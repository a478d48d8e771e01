// The epilogue: a warp stores its rows to global memory, staged through shared memory so that it
// writes whole rows. Rows in global memory start at multiples of 16 bytes and have a multiple of 8
// columns.
#pragma once

#include "common/gmem.cuh"
#include "sm90/tile.cuh"

namespace jvp_attn::sm90 {

// The 16 rows of a tile through which a warp stores.
template <int Rows, int Columns>
struct StagingRows {
    Tile<Rows, Columns> tile;
    int first_row;

    // Rounds `rows` and stores them here; the part that rounding took away stays in `rows`.
    template <class Element>
    DEVICE void store(Accumulator<Columns>& rows) const {
        const int lane = opaque(lane_index());
#pragma unroll
        for (int step = 0; step < Columns / 16; ++step) {
            Words4 words;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float& low = rows.at(2 * step + i / 2, i % 2, 0);
                float& high = rows.at(2 * step + i / 2, i % 2, 1);
                words.word[i] = pack<Element>(low, high);
                low -= unpack_low<Element>(words.word[i]);
                high -= unpack_high<Element>(words.word[i]);
            }
            store_matrices(address(lane, step), words);
        }
    }

    template <class Element>
    DEVICE void store(const Packed<Element, Columns>& rows) const {
        const int lane = opaque(lane_index());
#pragma unroll
        for (int step = 0; step < Columns / 16; ++step)
            store_matrices(address(lane, step), rows.fragment(step));
    }

    // rows -= factor∘staged rows, with one factor for each row.
    template <class Element>
    DEVICE void subtract_from(Accumulator<Columns>& rows, const float (&factor)[2]) const {
        const int lane = opaque(lane_index());
#pragma unroll
        for (int step = 0; step < Columns / 16; ++step) {
            const Words4 words = load_matrices(address(lane, step));
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                rows.at(2 * step + i / 2, i % 2, 0) -=
                    factor[i % 2] * unpack_low<Element>(words.word[i]);
                rows.at(2 * step + i / 2, i % 2, 1) -=
                    factor[i % 2] * unpack_high<Element>(words.word[i]);
            }
        }
    }

    // Rows and columns beyond the source become zero.
    DEVICE void copy_from(const GmemView& source, int first_source_row) const {
        constexpr int kChunks = Columns / 8;
#pragma unroll
        for (int i = opaque(lane_index()); i < 16 * kChunks; i += 32) {
            const int row = i / kChunks, chunk = i % kChunks, source_row = first_source_row + row;
            Words4 words = {};
            if (source_row < source.rows && 8 * chunk < source.columns)
                words = global_load(
                    reinterpret_cast<const Words4*>(source.element(source_row, 8 * chunk)));
            shared_store_words4(tile.chunk(first_row + row, chunk), words);
        }
    }

    DEVICE void copy_to(const GmemView& target, int first_target_row) const {
        constexpr int kChunks = Columns / 8;
#pragma unroll
        for (int i = opaque(lane_index()); i < 16 * kChunks; i += 32) {
            const int row = i / kChunks, chunk = i % kChunks, target_row = first_target_row + row;
            if (target_row < target.rows && 8 * chunk < target.columns)
                global_store(reinterpret_cast<Words4*>(target.element(target_row, 8 * chunk)),
                             shared_load_words4(tile.chunk(first_row + row, chunk)));
        }
    }

private:
    // The address of the row of 8 columns that a lane gives to stmatrix or ldmatrix.
    DEVICE SharedAddress address(int lane, int step) const {
        return tile.chunk(first_row + lane % 16, 2 * step + lane / 16);
    }
};

// Rounds and stores the 16 rows of a warp. If `target_lo` exists, it gets the part that rounding
// took away.
template <class Element, int Rows, int Columns>
DEVICE void store_rows(const GmemView& target, const GmemView& target_lo, int first_row,
                       Accumulator<Columns>& rows, const StagingRows<Rows, Columns>& staging) {
    staging.template store<Element>(rows);
    warp_barrier();
    staging.copy_to(target, first_row);
    warp_barrier();
    if (!target_lo.exists()) return;
    staging.template store<Element>(rows);
    warp_barrier();
    staging.copy_to(target_lo, first_row);
    warp_barrier();
}

// rows -= factor∘source, with one factor for each row; the source may be absent.
template <class Element, int Rows, int Columns>
DEVICE void subtract_rows(Accumulator<Columns>& rows, const float (&factor)[2],
                          const GmemView& source, int first_row,
                          const StagingRows<Rows, Columns>& staging) {
    if (!source.exists()) return;
    staging.copy_from(source, first_row);
    warp_barrier();
    staging.template subtract_from<Element>(rows, factor);
    warp_barrier();
}

}  // namespace jvp_attn::sm90
