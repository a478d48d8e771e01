// Matrix products of tiles. The micro-kernel keeps kMicroRows x kPanel results in registers: for
// each k it loads row k of a panel of B and multiplies it by single elements of A. Both operands
// stay in the caches: A is read once per panel of B, B once per kMicroRows rows of A.
#pragma once

#include <cstdint>

#include "cpu/vector.h"

namespace jvp_attn::cpu::JVP_ATTN_ISA {

// 16 registers hold 6 x 2 results, two vectors of B and a broadcast element; 32 hold 12 x 2.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kMicroRows = 12;
#else
constexpr int kMicroRows = 6;
#endif

// Columns of B that the micro-kernel works on.
template <class Value>
constexpr int kPanel = 2 * kLanes<Value>;

template <class Value>
constexpr int round_up_to_panel(int columns) {
    return (columns + kPanel<Value> - 1) / kPanel<Value> * kPanel<Value>;
}

enum class Store { set, add };

// A matrix in memory, or its transpose: element (i, j) is at i * row + j * column.
template <class Value>
struct OperandA {
    const Value* data;
    int64_t row, column;

    OperandA from_row(int i) const { return {data + i * row, row, column}; }
};

// Panels of kPanel columns: element (i, j) is at i * row + j / kPanel * panel + j % kPanel.
template <class Value>
struct OperandB {
    const Value* data;
    int64_t row, panel;
};

template <int Rows, Store Mode, class Value>
inline void micro_kernel(int depth, OperandA<Value> a, OperandB<Value> b, Value* c, int64_t c_row) {
    constexpr int lanes = kLanes<Value>;
    Vector<Value> sums[Rows][2] = {};
    for (int k = 0; k < depth; ++k) {
        const Value* const b_row = b.data + k * b.row;
        const Vector<Value> b0 = load(b_row), b1 = load(b_row + lanes);
#pragma GCC unroll 16
        for (int i = 0; i < Rows; ++i) {
            const Vector<Value> x = broadcast(a.data[i * a.row + k * a.column]);
            sums[i][0] += x * b0;
            sums[i][1] += x * b1;
        }
    }
    for (int i = 0; i < Rows; ++i, c += c_row) {
        // The product is summed from zero: adding each term to a large C would round every time.
        store(c, Mode == Store::add ? load(c) + sums[i][0] : sums[i][0]);
        store(c + lanes, Mode == Store::add ? load(c + lanes) + sums[i][1] : sums[i][1]);
    }
}

// The micro-kernel for the last rows, fewer than kMicroRows.
template <int Rows, Store Mode, class Value>
inline void remainder_kernel(int rows, int depth, OperandA<Value> a, OperandB<Value> b, Value* c,
                             int64_t c_row) {
    if constexpr (Rows > 0) {
        if (rows == Rows) return micro_kernel<Rows, Mode>(depth, a, b, c, c_row);
        remainder_kernel<Rows - 1, Mode>(rows, depth, a, b, c, c_row);
    }
}

// C (rows, columns) = A (rows, depth) B (depth, columns), or C += A B. B and C have whole panels of
// columns, and all of these are computed.
template <Store Mode, class Value>
inline void gemm(int rows, int columns, int depth, OperandA<Value> a, OperandB<Value> b, Value* c,
                 int64_t c_row) {
    for (int j = 0; j < columns; j += kPanel<Value>, b.data += b.panel, c += kPanel<Value>) {
        int i = 0;
        for (; i + kMicroRows <= rows; i += kMicroRows)
            micro_kernel<kMicroRows, Mode>(depth, a.from_row(i), b, c + i * c_row, c_row);
        remainder_kernel<kMicroRows - 1, Mode>(rows - i, depth, a.from_row(i), b, c + i * c_row,
                                               c_row);
    }
}

}  // namespace jvp_attn::cpu::JVP_ATTN_ISA
