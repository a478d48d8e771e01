// Rows of tensors, read as float or double from any element type, and written back.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/params.h"
#include "cpu/product.h"

namespace jvp_attn::cpu::JVP_ATTN_ISA {

inline float float_from_bfloat16(uint16_t x) { return std::bit_cast<float>(uint32_t{x} << 16); }

inline float float_from_float16(uint16_t x) {
    // The exponent moves into place, and is then off by 127 - 15; subnormals become normal.
    const float magnitude = std::bit_cast<float>(uint32_t(x & 0x7fff) << 13) * 0x1p112f;
    const uint32_t infinite = (x & 0x7fff) >= 0x7c00 ? 0x7f800000 : 0;
    return std::bit_cast<float>(std::bit_cast<uint32_t>(magnitude) | infinite |
                                uint32_t(x & 0x8000) << 16);
}

inline uint16_t bfloat16_from_float(float x) {
    const auto bits = std::bit_cast<uint32_t>(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return bits >> 16 | 0x40;  // NaN
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline uint16_t float16_from_float(float x) {
    const auto bits = std::bit_cast<uint32_t>(x);
    const uint16_t sign = bits >> 16 & 0x8000;
    const uint32_t magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return sign | 0x7e00;   // NaN
    if (magnitude >= 0x477ff000) return sign | 0x7c00;  // rounds beyond 65504
    if (magnitude < 0x38800000) {                       // subnormal: adding 1/2 rounds in place
        const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
        return sign | (std::bit_cast<uint32_t>(shifted) - 0x3f000000);
    }
    return sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

// One head of a tensor from its first row on; absent where there are no data.
struct Matrix {
    void* data;
    int64_t row_stride;
    Element element;

    explicit operator bool() const { return data != nullptr; }
};

template <class Value>
void read_row(const Matrix& m, int64_t row, int columns, Value* to) {
    const int64_t start = row * m.row_stride;
    if constexpr (std::is_same_v<Value, double>) {
        std::memcpy(to, static_cast<const double*>(m.data) + start, columns * sizeof(double));
    } else if (m.element == Element::float32) {
        std::memcpy(to, static_cast<const float*>(m.data) + start, columns * sizeof(float));
    } else {
        const auto* from = static_cast<const uint16_t*>(m.data) + start;
        if (m.element == Element::bfloat16)
            for (int j = 0; j < columns; ++j) to[j] = float_from_bfloat16(from[j]);
        else
            for (int j = 0; j < columns; ++j) to[j] = float_from_float16(from[j]);
    }
}

template <class Value>
void write_row(const Matrix& m, int64_t row, int columns, const Value* from) {
    const int64_t start = row * m.row_stride;
    if constexpr (std::is_same_v<Value, double>) {
        std::memcpy(static_cast<double*>(m.data) + start, from, columns * sizeof(double));
    } else if (m.element == Element::float32) {
        std::memcpy(static_cast<float*>(m.data) + start, from, columns * sizeof(float));
    } else {
        auto* to = static_cast<uint16_t*>(m.data) + start;
        if (m.element == Element::bfloat16)
            for (int j = 0; j < columns; ++j) to[j] = bfloat16_from_float(from[j]);
        else
            for (int j = 0; j < columns; ++j) to[j] = float16_from_float(from[j]);
    }
}

// Write a row, and where there is a residual what rounding took from it.
template <class Value>
void write_row(const Matrix& m, const Matrix& residual, int64_t row, int columns, Value* from) {
    write_row(m, row, columns, from);
    if (!residual) return;
    Value rounded[256];
    read_row(m, row, columns, rounded);
    for (int j = 0; j < columns; ++j) from[j] -= rounded[j];
    write_row(residual, row, columns, from);
}

// ------------------------------------------------------------------------------------------------
// Packing for `multiply`

// Rows as they are, each in whole panels, and one panel apart: a power of two would keep them all
// in the same few sets of the cache.
template <class Value>
constexpr int packed_width(int columns) {
    return round_up_to_panel<Value>(columns) + kPanel<Value>;
}

// (rows, packed_width) times a factor, zeros beyond the columns: A, or B of a product over rows.
template <class Value>
void pack(const Matrix& m, int64_t first, int rows, int columns, Value factor, Value* to) {
    const int width = packed_width<Value>(columns);
    for (int i = 0; i < rows; ++i, to += width) {
        read_row(m, first + i, columns, to);
        for (int j = 0; j < columns; ++j) to[j] *= factor;
        std::fill(to + columns, to + round_up_to_panel<Value>(columns), Value(0));
    }
}

// Mark the packed rows that are not finite and make them zero, for weights of 0 do not silence NaN.
// Returns whether there are any.
template <class Value>
bool take_out_non_finite(Value* packed, int rows, int columns, bool* hurt) {
    const int width = packed_width<Value>(columns);
    bool any = false;
    for (int i = 0; i < rows; ++i, packed += width) {
        Vector<Value> zero = {};
        for (int j = 0; j < columns; j += kLanes<Value>) zero += load(packed + j) * Value(0);
        hurt[i] = sum_of_lanes<Value>(zero) != 0;
        if (hurt[i]) std::fill(packed, packed + columns, Value(0));
        any |= hurt[i];
    }
    return any;
}

// Panels (rows / kPanel, columns, kPanel) of the transpose, zeros up to whole panels of rows: B of
// a product over columns.
template <class Value>
void pack_transposed(const Matrix& m, int64_t first, int rows, int columns, Value* to) {
    constexpr int panel = kPanel<Value>;
    for (int start = 0; start < rows; start += panel, to += columns * panel) {
        for (int i = 0; i < panel; ++i) {
            Value row[256] = {};
            if (start + i < rows) read_row(m, first + start + i, columns, row);
            for (int j = 0; j < columns; ++j) to[j * panel + i] = row[j];
        }
    }
}

}  // namespace jvp_attn::cpu::JVP_ATTN_ISA
