// From the registers of a warp to whole rows in global memory, by way of shared memory.
#pragma once

#include "matrix.cuh"
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
            store_matrices(tile.chunk(first_row + lane % 16, 2 * step + lane / 16), words);
        }
    }

    // Rows of the target start at multiples of 16 bytes, and have a multiple of 8 columns.
    DEVICE void copy_to(const Matrix& target, int first_target_row) const {
        constexpr int kChunks = Columns / 8;
#pragma unroll
        for (int i = opaque(lane_index()); i < 16 * kChunks; i += 32) {
            const int row = i / kChunks, chunk = i % kChunks, target_row = first_target_row + row;
            if (target_row < target.rows && 8 * chunk < target.columns)
                global_store(reinterpret_cast<Words4*>(target.element(target_row, 8 * chunk)),
                             shared_load_words4(tile.chunk(first_row + row, chunk)));
        }
    }
};

// Rounds and stores the 16 rows of a warp; and what rounding took away, if there is a place for it.
template <class Element, int Rows, int Columns>
DEVICE void store_rows(const Matrix& target, const Matrix& residual, int first_row,
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

}  // namespace jvp_attn::sm90
