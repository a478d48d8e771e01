// Matrices in the registers of a warp, in the layout of the tensor cores' accumulators.
//
// A warp holds 16 rows. With g = lane / 4 and t = lane % 4, a thread holds rows g and g + 8, and
// columns 2t and 2t + 1 of every 8. The four lanes of one g, a quad, share their rows.
#pragma once

#include <cstring>

#include "common/ptx.cuh"

namespace jvp_attn {

DEVICE int warp_index() { return thread_index() / 32; }

DEVICE int lane_index() { return thread_index() % 32; }

// The rows and columns of a thread: half is 0 or 1, `block` counts groups of 8 columns, side is 0
// or 1.
DEVICE int row_in_warp(int half) { return lane_index() / 4 + 8 * half; }

DEVICE int column_of(int block, int side) { return 8 * block + 2 * (lane_index() % 4) + side; }

DEVICE float quad_max(float x) {
    x = fmaxf(x, shuffle_xor(x, 1));
    return fmaxf(x, shuffle_xor(x, 2));
}

DEVICE float quad_sum(float x) {
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
}

// weight · x, but 0 if the weight is 0. x may be infinite for a hidden key, and 0 · inf is NaN.
DEVICE float masked_product(float weight, float x) { return weight == 0 ? 0 : weight * x; }

// 16 x Columns in float32.
template <int Columns>
struct Accumulator {
    static constexpr int kBlocks = Columns / 8;
    float value[kBlocks][4] = {};

    DEVICE float& at(int block, int half, int side) { return value[block][2 * half + side]; }
    DEVICE float at(int block, int half, int side) const { return value[block][2 * half + side]; }

    // The bits of the four elements of a block, for shared memory.
    DEVICE Words4 words(int block) const {
        Words4 words;
        memcpy(&words, value[block], sizeof words);
        return words;
    }

    DEVICE void set_words(int block, const Words4& words) {
        memcpy(value[block], &words, sizeof words);
    }

    // Rounded in the same way in every kernel, because scores are.
    DEVICE void scale(float factor) {
#pragma unroll
        for (int i = 0; i < kBlocks; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e) value[i][e] = multiply_rn(value[i][e], factor);
    }

    DEVICE void subtract_from_rows(const float (&amount)[2]) {
#pragma unroll
        for (int i = 0; i < kBlocks; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e) value[i][e] -= amount[e / 2];
    }

    // Zero where the weight is 0. A value may be infinite there, and 0 · inf is NaN.
    DEVICE void zero_unweighted(const Accumulator& weights) {
#pragma unroll
        for (int i = 0; i < kBlocks; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                if (weights.value[i][e] == 0) value[i][e] = 0;
    }

    DEVICE void scale_rows(const float (&factor)[2]) {
#pragma unroll
        for (int i = 0; i < kBlocks; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e) value[i][e] *= factor[e / 2];
    }

    // this -= factor∘other, with one factor for each row.
    DEVICE void subtract_scaled_rows(const float (&factor)[2], const Accumulator& other) {
#pragma unroll
        for (int i = 0; i < kBlocks; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e) value[i][e] -= factor[e / 2] * other.value[i][e];
    }

    DEVICE void exp2() {
#pragma unroll
        for (int i = 0; i < kBlocks; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e) value[i][e] = fast_exp2(value[i][e]);
    }
};

// 16 x Columns rounded to elements: the left factor of a product, in registers.
template <class Element, int Columns>
struct Packed {
    static constexpr int kBlocks = Columns / 8;
    uint32_t word[Columns / 16][4];  // 16 columns each, in the order of multiply_add

    DEVICE void set(int block, int half, float low, float high) {
        word[block / 2][block % 2 * 2 + half] = pack<Element>(low, high);
    }

    DEVICE float low(int block, int half) const {
        return unpack_low<Element>(word[block / 2][block % 2 * 2 + half]);
    }
    DEVICE float high(int block, int half) const {
        return unpack_high<Element>(word[block / 2][block % 2 * 2 + half]);
    }

    DEVICE Words4 fragment(int step) const {
        return {word[step][0], word[step][1], word[step][2], word[step][3]};
    }
};

// Row sums of rounded matrices: products with a vector of ones, exact in float32.
struct RowSums {
    float value[4] = {};  // of the two rows of a thread, each twice

    DEVICE float at(int half) const { return value[2 * half]; }

    template <class Element, int Columns>
    DEVICE void add(const Packed<Element, Columns>& x) {
        const uint32_t ones = pack<Element>(1, 1);
#pragma unroll
        for (int step = 0; step < Columns / 16; ++step)
            multiply_add<Element>(value, x.fragment(step), ones, ones);
    }
};

}  // namespace jvp_attn
