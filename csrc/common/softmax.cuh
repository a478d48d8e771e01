// Softmax of scores and its tangent, for a warp whose 16 rows are queries and whose columns are
// keys.
//
//     P = exp(S − lse)      T = s (tQ Kᵀ + Q tKᵀ)      tP = P∘(T − mu)
//
// Comments call P weights, S scores and T tangents.
#pragma once

#include "common/block.cuh"
#include "common/lse.cuh"

namespace jvp_attn {

// The keys that the two queries of a thread see, with a mask tensor if kMasked.
template <class Element, bool kMasked>
struct VisibleKeys {
    int query[2];
    int end[2];  // keys from here on are hidden by lengths or causality
    MaskOfHead<Element> mask;

    DEVICE VisibleKeys(const AttentionParams& p, const SeqlenInfo& sequence, int head,
                       int first_row)
        : mask(p.mask, sequence.batch, head) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            query[half] = first_row + row_in_warp(half);
            end[half] = sequence.visible_keys(query[half]);
        }
    }

    // The value to add to a score; -inf hides the key.
    DEVICE float bias(int half, int key) const {
        if (key >= end[half]) return -kInfinity;
        return kMasked ? mask.bias(query[half], key) : 0.f;
    }

    // Turns products Q Kᵀ of a tile of keys into scores; those of hidden keys become -inf.
    template <int Keys>
    DEVICE void apply(Accumulator<Keys>& scores, float scale, int first_key) const {
#pragma unroll
        for (int i = 0; i < scores.kBlocks; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int side = 0; side < 2; ++side) {
                    const float b = bias(half, first_key + column_of(i, side));
                    float& score = scores.at(i, half, side);
                    // A sum would be NaN if the score of a hidden key is +inf.
                    score = b == -kInfinity ? -kInfinity : fmaf(score, scale, b);
                }
    }
};

// Sets the tangents of hidden keys to 0. They may be infinite, and 0 · inf is NaN.
template <int Keys>
DEVICE void zero_hidden(Accumulator<Keys>& tangents, const Accumulator<Keys>& scores) {
#pragma unroll
    for (int i = 0; i < scores.kBlocks; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e)
            if (scores.value[i][e] == -kInfinity) tangents.value[i][e] = 0;
}

// lse of the two rows of a thread.
struct RowLse {
    float subtrahend[2];  // +inf in a row that sees no key
    bool centres;         // whether the warp centres its scores, because a row has a huge lse

    template <int Rows>
    DEVICE RowLse(const AttentionParams& p, const RowBlock<Rows>& block, int first_row) {
        const float* const source = block.statistic(p.lse);
        float lse[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = first_row + row_in_warp(half);
            lse[half] = row < block.sequence.queries ? global_load(source + row) : -kInfinity;
        }
        centres = warp_any(is_huge_lse(lse[0]) || is_huge_lse(lse[1]));
#pragma unroll
        for (int half = 0; half < 2; ++half) subtrahend[half] = subtrahend_of(lse[half], centres);
    }

    DEVICE bool sees_no_key(int half) const { return subtrahend[half] == kInfinity; }
};

// lse_lo of a row; 0 if it is absent. For code that runs rarely: `opaque` keeps the compiler from
// computing addresses before a loop, where they would occupy registers.
template <int Rows>
DEVICE float load_lse_lo(const AttentionParams& p, const RowBlock<Rows>& block, int row) {
    row = opaque(row);
    const float* const source = block.sequence.rows_of(p.lse_lo, opaque(block.head));
    return source && row < block.sequence.queries ? global_load(source + row) : 0;
}

// Turns scores into S − lse in units of log2, where S = scale · scores. `subtrahend` and `centres`
// are those of RowLse; lse_lo(half) returns lse_lo of a row.
template <int Keys, class LseLo>
DEVICE void subtract_lse(Accumulator<Keys>& scores, float scale, const float (&subtrahend)[2],
                         bool centres, const LseLo& lse_lo) {
    if (centres) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float low = lse_lo(half);
#pragma unroll
            for (int i = 0; i < scores.kBlocks; ++i)
#pragma unroll
                for (int side = 0; side < 2; ++side) {
                    float& score = scores.at(i, half, side);
                    score = centred(multiply_rn(score, scale), subtrahend[half], low);
                }
        }
    } else {
#pragma unroll
        for (int i = 0; i < scores.kBlocks; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                scores.value[i][e] = fmaf(scores.value[i][e], scale * kLog2E, -subtrahend[e / 2]);
    }
}

// Online softmax over tiles of keys (FlashAttention-2, arXiv 2307.08691).
struct OnlineSoftmax {
    float max[2] = {-kInfinity, -kInfinity};  // of S so far
    float sum[2] = {0, 0};                    // of the weights in this thread's columns

    // A weight is 2^(score · factor − subtrahend).
    struct Exponents {
        float factor;
        float subtrahend[2];

        DEVICE float weight(float score, int half) const {
            return fast_exp2(fmaf(score, factor, -subtrahend[half]));
        }
    };

    // Turns scores into weights relative to the maximum so far, where S = scale · scores and the
    // scale is positive. `rescaling` becomes the factor of each row that brings earlier weights to
    // the new maximum.
    template <int Keys>
    DEVICE void update(Accumulator<Keys>& scores, float scale, float (&rescaling)[2]) {
        exponentiate(scores, update_max(scores, scale, rescaling), rescaling);
    }

    // The first half of `update`: returns the exponents that turn scores into weights. It changes
    // the scores where they are huge.
    template <int Keys>
    DEVICE Exponents update_max(Accumulator<Keys>& scores, float scale, float (&rescaling)[2]) {
        float subtrahend[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float tile_max = scores.at(0, half, 0);
#pragma unroll
            for (int i = 0; i < scores.kBlocks; ++i)
                tile_max = fmaxf(tile_max, fmaxf(scores.at(i, half, 0), scores.at(i, half, 1)));
            const float new_max = fmaxf(max[half], multiply_rn(quad_max(tile_max), scale));
            // In a row that has seen no key the weights are exp2(-inf - 0) = 0.
            subtrahend[half] = new_max == -kInfinity ? 0 : new_max;
            rescaling[half] = fast_exp2((max[half] - subtrahend[half]) * kLog2E);
            max[half] = new_max;
        }
        float factor = scale * kLog2E;
        // Centre the scores where the product with log2(e) would be too inexact.
        if (warp_any(is_huge(subtrahend[0]) || is_huge(subtrahend[1]))) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
#pragma unroll
                for (int i = 0; i < scores.kBlocks; ++i)
#pragma unroll
                    for (int side = 0; side < 2; ++side) {
                        float& score = scores.at(i, half, side);
                        score = multiply_rn(score, scale) - subtrahend[half];
                    }
                subtrahend[half] = 0;
            }
            factor = kLog2E;
        }
        return {factor, {subtrahend[0] * kLog2E, subtrahend[1] * kLog2E}};
    }

    // The second half of `update`.
    template <int Keys>
    DEVICE void exponentiate(Accumulator<Keys>& scores, const Exponents& exponents,
                             const float (&rescaling)[2]) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            sum[half] *= rescaling[half];
#pragma unroll
            for (int i = 0; i < scores.kBlocks; ++i)
#pragma unroll
                for (int side = 0; side < 2; ++side) {
                    float& score = scores.at(i, half, side);
                    score = exponents.weight(score, half);
                    sum[half] += score;
                }
        }
    }

    // Stores lse and lse_lo of the warp's rows. `normalisation` becomes the factor of each row of
    // O.
    template <int Rows>
    DEVICE void finish(const AttentionParams& p, const RowBlock<Rows>& block, int first_row,
                       float (&normalisation)[2]) const {
        float* const lse = block.statistic(p.lse);
        float* const lse_lo = block.statistic(p.lse_lo);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float total = quad_sum(sum[half]);
            const bool sees_no_key = total == 0;
            normalisation[half] = sees_no_key ? 0 : 1 / total;
            const int row = first_row + row_in_warp(half);
            if (lane_index() % 4 != 0 || row >= block.sequence.queries) continue;
            const float log_sum = multiply_rn(log2f(total), kLn2);
            const float rounded = sees_no_key ? -kInfinity : max[half] + log_sum;
            global_store(lse + row, rounded);
            if (!lse_lo) continue;
            const bool max_is_larger = fabsf(max[half]) > fabsf(log_sum);
            const float larger = max_is_larger ? max[half] : log_sum;
            const float smaller = max_is_larger ? log_sum : max[half];
            global_store(lse_lo + row, sees_no_key ? 0 : (larger - rounded) + smaller);
        }
    }
};

// P∘(T − c), rounded, with a reference c for each row. A common offset of T along a row cancels in
// tO, but it would increase the rounding error of P∘T, so it is subtracted first: c is the mean of
// T, weighted by P, in the first tile whose weights are not all 0. If all earlier weights vanish
// beside those of a tile, so do the sums, and c is set anew.
//
// Each row has two sums. tO is centred with the sum of the rounded values, which cancels part of
// their rounding error; mu uses the sum of the exact values.
struct TangentWeights {
    float reference[2] = {0, 0};
    bool known[2] = {false, false};
    RowSums rounded_sum;          // of the rounded P∘(T − c)
    float exact_sum[2] = {0, 0};  // of P∘(T − c) in this thread's columns

    // Sets c of the rows that have none. `tangents` lack the softmax scale.
    template <int Keys>
    DEVICE void set_reference(const Accumulator<Keys>& weights, const Accumulator<Keys>& tangents,
                              float scale) {
        if (!warp_any(!known[0] || !known[1])) return;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float total = 0, weight = 0;
#pragma unroll
            for (int i = 0; i < weights.kBlocks; ++i)
#pragma unroll
                for (int side = 0; side < 2; ++side) {
                    total += masked_product(weights.at(i, half, side), tangents.at(i, half, side));
                    weight += weights.at(i, half, side);
                }
            total = quad_sum(total);
            weight = quad_sum(weight);
            if (!known[half] && weight > 0) {
                reference[half] = total / weight * scale;
                known[half] = true;
            }
        }
    }

    // Rescales the sums to the new maximum of the online softmax.
    DEVICE void rescale(const float (&factor)[2]) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            rounded_sum.value[2 * half] *= factor[half];
            rounded_sum.value[2 * half + 1] *= factor[half];
            exact_sum[half] *= factor[half];
            if (factor[half] == 0) known[half] = false;
        }
    }

    template <class Element, int Keys>
    DEVICE void update(Packed<Element, Keys>& weighted, const Accumulator<Keys>& weights,
                       const Accumulator<Keys>& tangents, float scale) {
#pragma unroll
        for (int i = 0; i < tangents.kBlocks; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float c = reference[half];
                const float low = weights.at(i, half, 0) * (tangents.at(i, half, 0) * scale - c);
                const float high = weights.at(i, half, 1) * (tangents.at(i, half, 1) * scale - c);
                weighted.set(i, half, low, high);
                exact_sum[half] += low + high;
            }
        rounded_sum.add(weighted);
    }
};

// Rounds weights, to use them as the left factor of a product.
template <class Element, int Keys>
DEVICE void round_weights(Packed<Element, Keys>& rounded, const Accumulator<Keys>& weights) {
#pragma unroll
    for (int i = 0; i < weights.kBlocks; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half)
            rounded.set(i, half, weights.at(i, half, 0), weights.at(i, half, 1));
}

}  // namespace jvp_attn
