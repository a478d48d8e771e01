// Matrix products of tiles. The micro-kernel keeps kRowsAtOnce x kPanel results in registers: each
// step of the depth loads one row of a panel of B, and multiplies it by elements of A one by one.
// Both factors stay in the caches: A is read again for each panel of B, B for each kRowsAtOnce of
// A.
#pragma once

#include <cstdint>

#include "cpu/vector.h"

namespace jvp_attn::cpu::JVP_ATTN_ISA {

// 16 registers hold 6 x 2 results, two vectors of B and a broadcast element; 32 hold 12 x 2.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRowsAtOnce = 12;
#else
constexpr int kRowsAtOnce = 6;
#endif

// Columns of B that are worked on at a time.
template <class Value>
constexpr int kPanel = 2 * kLanes<Value>;

template <class Value>
constexpr int round_up_to_panel(int columns) {
    return (columns + kPanel<Value> - 1) / kPanel<Value> * kPanel<Value>;
}

enum class Store { set, add };

// A matrix in memory, or its transpose: element (i, j) is at i * row + j * column.
template <class Value>
struct Left {
    const Value* data;
    int64_t row, column;

    Left from_row(int i) const { return {data + i * row, row, column}; }
};

// Panels of kPanel columns: element (i, j) is at i * row + j / kPanel * panel + j % kPanel.
template <class Value>
struct Right {
    const Value* data;
    int64_t row, panel;
};

template <int Rows, Store Mode, class Value>
inline void multiply_panel(int depth, Left<Value> a, Right<Value> b, Value* c, int64_t c_row) {
    constexpr int lanes = kLanes<Value>;
    Vector<Value> sums[Rows][2] = {};
    for (int k = 0; k < depth; ++k) {
        const Value* const b_row = b.data + k * b.row;
        const Vector<Value> b0 = load(b_row), b1 = load(b_row + lanes);
#pragma GCC unroll 16
        for (int i = 0; i < Rows; ++i) {
            const Vector<Value> x = in_all_lanes(a.data[i * a.row + k * a.column]);
            sums[i][0] += x * b0;
            sums[i][1] += x * b1;
        }
    }
    for (int i = 0; i < Rows; ++i, c += c_row) {
        // Summed from zero first: adding one by one to a large sum would round as often.
        store(c, Mode == Store::add ? load(c) + sums[i][0] : sums[i][0]);
        store(c + lanes, Mode == Store::add ? load(c + lanes) + sums[i][1] : sums[i][1]);
    }
}

template <int Rows, Store Mode, class Value>
inline void multiply_last_rows(int rows, int depth, Left<Value> a, Right<Value> b, Value* c,
                               int64_t c_row) {
    if constexpr (Rows > 0) {
        if (rows == Rows) return multiply_panel<Rows, Mode>(depth, a, b, c, c_row);
        multiply_last_rows<Rows - 1, Mode>(rows, depth, a, b, c, c_row);
    }
}

// C (rows, columns) = A (rows, depth) B (depth, columns), or += . Columns are rounded up to panels,
// of which B and C have all.
template <Store Mode, class Value>
inline void multiply(int rows, int columns, int depth, Left<Value> a, Right<Value> b, Value* c,
                     int64_t c_row) {
    for (int j = 0; j < columns; j += kPanel<Value>, b.data += b.panel, c += kPanel<Value>) {
        int i = 0;
        for (; i + kRowsAtOnce <= rows; i += kRowsAtOnce)
            multiply_panel<kRowsAtOnce, Mode>(depth, a.from_row(i), b, c + i * c_row, c_row);
        multiply_last_rows<kRowsAtOnce - 1, Mode>(rows - i, depth, a.from_row(i), b, c + i * c_row,
                                                  c_row);
    }
}

}  // namespace jvp_attn::cpu::JVP_ATTN_ISA
