// Rows of tensors, packed as operands of `gemm`.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/gemm.h"
#include "cpu/matrix_view.h"

namespace jvp_attn::cpu::JVP_ATTN_ISA {

// The row stride of packed rows: whole panels, and one panel more, for with a power of two all rows
// would compete for the same few sets of the cache.
template <class Value>
constexpr int packed_width(int columns) {
    return round_up_to_panel<Value>(columns) + kPanel<Value>;
}

// Packs rows as A, or as B of a product that sums over rows: (rows, packed_width), times a factor,
// zeros in the columns that fill up the last panel.
template <class Value>
void pack(const MatrixView& m, int64_t first, int rows, int columns, Value factor, Value* to) {
    const int width = packed_width<Value>(columns);
    for (int i = 0; i < rows; ++i, to += width) {
        read_row(m, first + i, columns, to);
        for (int j = 0; j < columns; ++j) to[j] *= factor;
        std::fill(to + columns, to + round_up_to_panel<Value>(columns), Value(0));
    }
}

// Packs the transpose as B of a product that sums over columns: panels (rows / kPanel, columns,
// kPanel), zeros in the rows that fill up the last panel.
template <class Value>
void pack_transposed(const MatrixView& m, int64_t first, int rows, int columns, Value* to) {
    constexpr int panel = kPanel<Value>;
    for (int start = 0; start < rows; start += panel, to += columns * panel) {
        for (int i = 0; i < panel; ++i) {
            Value row[256] = {};
            if (start + i < rows) read_row(m, first + start + i, columns, row);
            for (int j = 0; j < columns; ++j) to[j * panel + i] = row[j];
        }
    }
}

// Marks the packed rows that are not finite and sets them to zero: a weight of 0 times NaN would be
// NaN. Returns whether there are any.
template <class Value>
bool zero_nonfinite_rows(Value* packed, int rows, int columns, bool* nonfinite) {
    const int width = packed_width<Value>(columns);
    bool any = false;
    for (int i = 0; i < rows; ++i, packed += width) {
        Vector<Value> zero = {};
        for (int j = 0; j < columns; j += kLanes<Value>) zero += load(packed + j) * Value(0);
        nonfinite[i] = sum_of_lanes<Value>(zero) != 0;
        if (nonfinite[i]) std::fill(packed, packed + columns, Value(0));
        any |= nonfinite[i];
    }
    return any;
}

}  // namespace jvp_attn::cpu::JVP_ATTN_ISA
