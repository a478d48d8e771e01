// Where one sequence lies in the tensors, and which keys its queries see.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "cpu/rows.h"

namespace jvp_attn::cpu::JVP_ATTN_ISA {

template <class Value>
constexpr Value kInfinity = std::numeric_limits<Value>::infinity();

struct Sequence {
    int batch;
    int64_t first_query = 0, first_key = 0;
    int queries;
    int keys;  // the used ones, without padding

    Sequence(const AttentionParams& p, int batch_index)
        : batch(batch_index), queries(p.seqlen_q), keys(p.seqlen_k), causal_(p.causal) {
        if (p.cu_seqlens_q) {
            first_query = p.cu_seqlens_q[batch];
            queries = p.cu_seqlens_q[batch + 1] - static_cast<int>(first_query);
            first_key = p.cu_seqlens_k[batch];
            keys = p.cu_seqlens_k[batch + 1] - static_cast<int>(first_key);
        }
        if (p.seqused_k) keys = std::clamp(p.seqused_k[batch], 0, keys);
        diagonal_ = causal_ == Causal::bottom_right ? keys - queries : 0;
    }

    // How many keys, counted from the first, a query sees if there is no mask.
    int visible_keys(int query) const {
        if (causal_ == Causal::no) return keys;
        return static_cast<int>(
            std::clamp<int64_t>(int64_t{query} + 1 + diagonal_, 0, int64_t{keys}));
    }

    Matrix queries_of(const Tensor& x, Element element, int head) const {
        return matrix(x, element, head, first_query);
    }

    Matrix keys_of(const Tensor& x, Element element, int head) const {
        return matrix(x, element, head, first_key);
    }

    // The statistics of the queries of one head; null where there are none.
    template <class Value>
    Value* rows_of(const RowVector& x, int head) const {
        if (!x.data) return nullptr;
        return static_cast<Value*>(x.data) + batch * x.batch_stride + head * x.head_stride +
               first_query;
    }

private:
    Causal causal_;
    int diagonal_;

    Matrix matrix(const Tensor& x, Element element, int head, int64_t first_row) const {
        if (!x.data) return {nullptr, 0, element};
        const int size = element == Element::float64 ? 8 : element == Element::float32 ? 4 : 2;
        const int64_t start =
            batch * x.batch_stride + head * x.head_stride + first_row * x.row_stride;
        return {static_cast<char*>(x.data) + start * size, x.row_stride, element};
    }
};

// A mask, its tangent or its gradient, for one head.
template <class Value>
class MaskOfHead {
public:
    MaskOfHead(const Mask& mask, int batch, int head)
        : mask_(mask), start_(batch * mask.batch_stride + head * mask.head_stride) {}

    explicit operator bool() const { return mask_.data != nullptr; }

    // Add one row of it to scores; a boolean one hides keys.
    void add_to(Value* scores, int row, int first_key, int keys) const {
        const int64_t place = start_ + row * mask_.row_stride + first_key * mask_.column_stride;
        const int64_t step = mask_.column_stride;
        switch (mask_.element) {
            case Element::boolean: {
                const auto* from = static_cast<const uint8_t*>(mask_.data) + place;
                for (int j = 0; j < keys; ++j)
                    if (!from[j * step]) scores[j] = -kInfinity<Value>;
                return;
            }
            case Element::float32:
                return add(scores, keys, static_cast<const float*>(mask_.data) + place, step,
                           [](float x) { return Value(x); });
            case Element::float64:
                return add(scores, keys, static_cast<const double*>(mask_.data) + place, step,
                           [](double x) { return Value(x); });
            case Element::bfloat16:
                return add(scores, keys, static_cast<const uint16_t*>(mask_.data) + place, step,
                           float_from_bfloat16);
            case Element::float16:
                return add(scores, keys, static_cast<const uint16_t*>(mask_.data) + place, step,
                           float_from_float16);
        }
    }

    // Add scores to one row of it, summed where it does not vary.
    void add_from(const Value* scores, int row, int first_key, int keys) const {
        auto* to = static_cast<Value*>(mask_.data) + start_ + row * mask_.row_stride +
                   first_key * mask_.column_stride;
        for (int j = 0; j < keys; ++j) to[j * mask_.column_stride] += scores[j];
    }

private:
    Mask mask_;
    int64_t start_;

    template <class From, class Convert>
    static void add(Value* scores, int keys, const From* from, int64_t step, Convert convert) {
        for (int j = 0; j < keys; ++j) {
            const Value x = convert(from[j * step]);
            // What is hidden may hold NaN, and -inf would not hide that.
            scores[j] = x == -kInfinity<Value> ? x : scores[j] + x;
        }
    }
};

}  // namespace jvp_attn::cpu::JVP_ATTN_ISA
