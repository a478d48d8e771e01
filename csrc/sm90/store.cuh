// Between the registers of a warp and whole rows in global memory, by way of shared memory. Those
// start at multiples of 16 bytes, and have a multiple of 8 columns.
#pragma once

#include "common/gmem.cuh"
#include "sm90/tile.cuh"

namespace jvp_attn::sm90 {

// 16 rows of a tile that are a warp's own.
template <int Rows, int Columns>
struct Stage {
    Tile<Rows, Columns> tile;
    int first_row;

    // Rounds `rows` to elements, and leaves in `rows` what rounding took away.
    template <class Element>
    DEVICE void put(Accumulator<Columns>& rows) const {
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
            store_matrices(place(lane, step), words);
        }
    }

    template <class Element>
    DEVICE void put(const Packed<Element, Columns>& rows) const {
        const int lane = opaque(lane_index());
#pragma unroll
        for (int step = 0; step < Columns / 16; ++step)
            store_matrices(place(lane, step), rows.fragment(step));
    }

    // Subtracts from `rows` what lies here, each row times a factor.
    template <class Element>
    DEVICE void subtract_from(Accumulator<Columns>& rows, const float (&factor)[2]) const {
        const int lane = opaque(lane_index());
#pragma unroll
        for (int step = 0; step < Columns / 16; ++step) {
            const Words4 words = load_matrices(place(lane, step));
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                rows.at(2 * step + i / 2, i % 2, 0) -=
                    factor[i % 2] * unpack_low<Element>(words.word[i]);
                rows.at(2 * step + i / 2, i % 2, 1) -=
                    factor[i % 2] * unpack_high<Element>(words.word[i]);
            }
        }
    }

    // Zeros beyond the source.
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
    // Of the row that a lane loads or stores of 16 columns.
    DEVICE SharedAddress place(int lane, int step) const {
        return tile.chunk(first_row + lane % 16, 2 * step + lane / 16);
    }
};

// Rounds and stores the 16 rows of a warp; and what rounding took away, if there is a place for it.
template <class Element, int Rows, int Columns>
DEVICE void store_rows(const GmemView& target, const GmemView& residual, int first_row,
                       Accumulator<Columns>& rows, const Stage<Rows, Columns>& stage) {
    stage.template put<Element>(rows);
    warp_barrier();
    stage.copy_to(target, first_row);
    warp_barrier();
    if (!residual.exists()) return;
    stage.template put<Element>(rows);
    warp_barrier();
    stage.copy_to(residual, first_row);
    warp_barrier();
}

// rows -= factor∘source, where the source may be absent.
template <class Element, int Rows, int Columns>
DEVICE void subtract_rows(Accumulator<Columns>& rows, const float (&factor)[2],
                          const GmemView& source, int first_row,
                          const Stage<Rows, Columns>& stage) {
    if (!source.exists()) return;
    stage.copy_from(source, first_row);
    warp_barrier();
    stage.template subtract_from<Element>(rows, factor);
    warp_barrier();
}

}  // namespace jvp_attn::sm90
