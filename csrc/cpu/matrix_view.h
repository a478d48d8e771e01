// Rows of tensors, read as float or double from any element type, and written back.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/half.h"
#include "cpu/params.h"

namespace jvp_attn::cpu::JVP_ATTN_ISA {

// The rows of one head of one sequence; false if the tensor is absent.
struct MatrixView {
    void* data;
    int64_t row_stride;
    Element element;

    explicit operator bool() const { return data != nullptr; }
};

// Reads a row as float or double.
template <class Value>
void read_row(const MatrixView& m, int64_t row, int columns, Value* to) {
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
void write_row(const MatrixView& m, int64_t row, int columns, const Value* from) {
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

// Writes a row and, if present, the low-order part that rounding took from it; overwrites `from`.
template <class Value>
void write_row(const MatrixView& m, const MatrixView& low, int64_t row, int columns, Value* from) {
    write_row(m, row, columns, from);
    if (!low) return;
    Value rounded[256];
    read_row(m, row, columns, rounded);
    for (int j = 0; j < columns; ++j) from[j] -= rounded[j];
    write_row(low, row, columns, from);
}

}  // namespace jvp_attn::cpu::JVP_ATTN_ISA
