// The attention mask: boolean, or added to the scores.
#pragma once

#include <cstdint>

#include "cpu/half.h"
#include "cpu/params.h"
#include "cpu/seqlen.h"

namespace jvp_attn::cpu::JVP_ATTN_ISA {

// A mask, its tangent or its gradient, of one head.
template <class Value>
class MaskOfHead {
public:
    MaskOfHead(const Mask& mask, int batch, int head)
        : mask_(mask), start_(mask.entry_of(batch) * mask.batch_stride + head * mask.head_stride) {}

    explicit operator bool() const { return mask_.data != nullptr; }

    // Adds row `row` of the mask to scores; a boolean mask sets masked scores to -inf.
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

    // Adds `scores` to row `row` of a gradient; broadcast dimensions sum them.
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
            // Where the mask is -inf, replace the score: it may be NaN, and NaN - inf is NaN.
            scores[j] = x == -kInfinity<Value> ? x : scores[j] + x;
        }
    }
};

}  // namespace jvp_attn::cpu::JVP_ATTN_ISA
