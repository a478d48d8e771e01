// A view of rows in global memory, and stores from the registers of a warp to it.
#pragma once

#include "common/fragment.cuh"

namespace jvp_attn {

// The rows of one head of one sequence in global memory.
struct GmemView {
    uint16_t* data;
    int64_t row_stride;
    int rows;
    int columns;

    DEVICE bool exists() const { return data != nullptr; }

    // Whether every row starts at a multiple of `bytes`.
    DEVICE bool aligned_to(int bytes) const {
        const auto start = reinterpret_cast<uintptr_t>(data);
        return (start | static_cast<uintptr_t>(row_stride * 2)) % bytes == 0;
    }

    DEVICE uint16_t* element(int row, int column) const { return data + row * row_stride + column; }
};

// Two elements of a row.
struct Pair {
    float low, high;
};

// The elements at `column`, which is even, and `column` + 1; zero beyond the view.
template <class Element>
DEVICE Pair load_pair(const GmemView& view, int row, int column) {
    if (!view.exists() || row >= view.rows || column >= view.columns) return {0, 0};
    const uint16_t* source = view.element(row, column);
    uint32_t word = 0;
    if (column + 1 == view.columns)
        word = global_load(source);
    else if (view.aligned_to(4))
        word = global_load(reinterpret_cast<const uint32_t*>(source));
    else
        word = global_load(source) | static_cast<uint32_t>(global_load(source + 1)) << 16;
    return {unpack_low<Element>(word), unpack_high<Element>(word)};
}

DEVICE void store_pair(const GmemView& view, int row, int column, uint32_t word) {
    if (row >= view.rows || column >= view.columns) return;
    uint16_t* target = view.element(row, column);
    if (column + 1 < view.columns && view.aligned_to(4)) {
        global_store(reinterpret_cast<uint32_t*>(target), word);
        return;
    }
    global_store(target, static_cast<uint16_t>(word));
    if (column + 1 < view.columns) global_store(target + 1, static_cast<uint16_t>(word >> 16));
}

// Rounds and stores a lane's columns in 8 block to 8 block + 7 of the 16 rows of a warp. If
// `target_lo` exists, it gets the part that rounding took away.
template <class Element, int Columns>
DEVICE void store_block(const GmemView& target, const GmemView& target_lo, int first_row,
                        const Accumulator<Columns>& rows, int block, int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float low = rows.at(block, half, 0), high = rows.at(block, half, 1);
        const uint32_t rounded = pack<Element>(low, high);
        const int row = first_row + lane / 4 + 8 * half, column = 8 * block + lane % 4 * 2;
        store_pair(target, row, column, rounded);
        if (target_lo.exists())
            store_pair(target_lo, row, column,
                       pack<Element>(low - unpack_low<Element>(rounded),
                                     high - unpack_high<Element>(rounded)));
    }
}

template <class Element, int Columns>
DEVICE void store_rows(const GmemView& target, const GmemView& target_lo, int first_row,
                       const Accumulator<Columns>& rows) {
    const int lane = opaque(lane_index());  // to compute addresses here, not before a loop
#pragma unroll
    for (int i = 0; i < rows.kBlocks; ++i)
        store_block<Element>(target, target_lo, first_row, rows, i, lane);
}

}  // namespace jvp_attn
