// Small integers, whose products and sums are exact, and plain products of them.
#pragma once

#include <algorithm>
#include <random>
#include <vector>

#include "comparison.h"
#include "recorder.h"

namespace jvp_attn::witness {

struct Matrix {
    int rows, columns;
    std::vector<float> values;

    Matrix(int rows, int columns) : rows(rows), columns(columns), values(rows * columns) {}

    float& operator()(int row, int column) { return values[row * columns + column]; }
    float operator()(int row, int column) const { return values[row * columns + column]; }

    Matrix transposed() const {
        Matrix x(columns, rows);
        for (int row = 0; row < rows; ++row)
            for (int column = 0; column < columns; ++column) x(column, row) = (*this)(row, column);
        return x;
    }

    Matrix rows_from(int first, int count) const {
        Matrix x(count, columns);
        std::copy_n(values.begin() + first * columns, count * columns, x.values.begin());
        return x;
    }
};

inline Matrix random_matrix(int rows, int columns) {
    static std::mt19937 generator(1);
    Matrix x(rows, columns);
    for (float& value : x.values) value = static_cast<int>(generator() % 17) - 8;
    return x;
}

// c += A B
inline void add_product(Matrix& c, const Matrix& a, const Matrix& b) {
    for (int i = 0; i < a.rows; ++i)
        for (int k = 0; k < a.columns; ++k)
            for (int j = 0; j < b.columns; ++j) c(i, j) += a(i, k) * b(k, j);
}

inline Matrix product(const Matrix& a, const Matrix& b) {
    Matrix c(a.rows, b.columns);
    add_product(c, a, b);
    return c;
}

// The rows of a warp or a warpgroup, as csrc says which of them a thread holds.
template <int Columns>
using Accumulators = std::vector<Accumulator<Columns>>;

inline int row_of_thread(int half) { return 16 * warp_index() + row_in_warp(half); }

template <int Columns>
Packed<Bf16, Columns> packed_rows(const Matrix& x) {
    Packed<Bf16, Columns> packed;
    for (int block = 0; block < packed.kBlocks; ++block)
        for (int half = 0; half < 2; ++half) {
            const int row = row_of_thread(half);
            packed.set(block, half, x(row, column_of(block, 0)), x(row, column_of(block, 1)));
        }
    return packed;
}

template <int Columns>
Accumulators<Columns> accumulators_of(const Matrix& x) {
    Accumulators<Columns> all(2 * x.rows);
    for (int thread = 0; thread < 2 * x.rows; ++thread) {
        emulator::current.thread = thread;
        for (int block = 0; block < Columns / 8; ++block)
            for (int half = 0; half < 2; ++half)
                for (int side = 0; side < 2; ++side)
                    all[thread].at(block, half, side) =
                        x(row_of_thread(half), column_of(block, side));
    }
    return all;
}

template <int Columns>
void compare_product(Comparison& comparison, const Accumulators<Columns>& csrc,
                     const Matrix& expected, const char* what) {
    const Accumulators<Columns> all = accumulators_of<Columns>(expected);
    for (std::size_t thread = 0; thread < all.size(); ++thread)
        for (int i = 0; i < Columns / 2; ++i)
            comparison.equal(csrc[thread].value[i / 4][i % 4], all[thread].value[i / 4][i % 4],
                             what, thread, i);
}

}  // namespace jvp_attn::witness
