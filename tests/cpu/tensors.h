// Tensors for tests of the kernels: filled with random numbers, converted to matrices of double,
// and described as the kernels expect. Buffers end with the last element, so that sanitizers report
// an access beyond it.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>
#include <random>
#include <type_traits>
#include <vector>

#include "cpu/params.h"
#include "naive.h"

using namespace jvp_attn::cpu;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

template <class Value>
constexpr Element kElement = std::is_same_v<Value, double>  ? Element::float64
                             : std::is_same_v<Value, float> ? Element::float32
                                                            : Element::bfloat16;

inline double read(double x) { return x; }
inline double read(float x) { return x; }
inline double read(uint16_t x) { return std::bit_cast<float>(uint32_t{x} << 16); }
inline void write(double& to, double x) { to = x; }
inline void write(float& to, double x) { to = static_cast<float>(x); }
inline void write(uint16_t& to, double x) {
    to = std::bit_cast<uint32_t>(static_cast<float>(x)) >> 16;  // truncated
}

// (batch, row, head, column) with gaps between rows, so that strides are not products of sizes.
template <class Value>
class Rows {
public:
    Rows(const std::vector<int>& lengths, int heads, int columns, bool packed)
        : heads_(heads),
          columns_(columns),
          head_stride_(columns + 1),
          row_stride_(heads * head_stride_) {
        int64_t rows = 0;
        for (const int length : lengths) {
            first_.push_back(rows);
            rows += length;
        }
        batch_stride_ = packed || lengths.empty() ? 0 : lengths[0] * row_stride_;
        data_.resize(std::max<int64_t>(rows * row_stride_ - 1, 0));
    }

    Tensor tensor() { return {data_.data(), batch_stride_, row_stride_, head_stride_}; }

    Value& at(int sequence, int head, int row, int column) {
        return data_[(first_[sequence] + row) * row_stride_ + head * head_stride_ + column];
    }

    naive::Matrix matrix(int sequence, int head, int rows) {
        naive::Matrix result(rows, columns_);
        for (int i = 0; i < rows; ++i)
            for (int j = 0; j < columns_; ++j) result(i, j) = read(at(sequence, head, i, j));
        return result;
    }

    void fill(std::mt19937& random) {
        std::normal_distribution<double> normal;
        for (Value& x : data_) write(x, normal(random));
    }

    // Fills the rows [begin, end) of each sequence with NaN.
    void fill_nan(const std::vector<int>& begin, const std::vector<int>& end) {
        for (size_t i = 0; i < begin.size(); ++i)
            for (int row = begin[i]; row < end[i]; ++row)
                for (int head = 0; head < heads_; ++head)
                    for (int j = 0; j < columns_; ++j) write(at(i, head, row, j), kNaN);
    }

    const std::vector<Value>& data() const { return data_; }

private:
    int heads_, columns_;
    int64_t head_stride_, row_stride_, batch_stride_;
    std::vector<int64_t> first_;
    std::vector<Value> data_;
};

// (batch, head, row), such as lse; rows are contiguous.
template <class Value>
class Vectors {
public:
    Vectors(const std::vector<int>& lengths, int heads, bool packed) {
        for (const int length : lengths) {
            first_.push_back(packed ? rows_ : 0);
            rows_ = packed ? rows_ + length : length;
        }
        batch_stride_ = packed ? 0 : heads * rows_;
        data_.resize(heads * rows_ * (packed ? 1 : lengths.size()));
    }

    RowVector vector() { return {data_.data(), batch_stride_, rows_}; }

    naive::Matrix matrix(int sequence, int head, int rows) {
        naive::Matrix result(rows, 1);
        for (int i = 0; i < rows; ++i)
            result(i, 0) = data_[sequence * batch_stride_ + head * rows_ + first_[sequence] + i];
        return result;
    }

    void fill(std::mt19937& random) {
        std::normal_distribution<double> normal;
        for (Value& x : data_) x = normal(random);
    }

    const std::vector<Value>& data() const { return data_; }

private:
    int64_t rows_ = 0, batch_stride_;
    std::vector<int64_t> first_;
    std::vector<Value> data_;
};
