// Softmax of scores and its tangent, for a warp whose 16 rows are queries and whose columns are
// keys.
//
//     P = exp(S − lse)      T = s (tQ Kᵀ + Q tKᵀ)      tP = P∘(T − mu)
//
// Scores are in units of log2, since the machine computes powers of 2. Comments call P weights, S
// scores and T tangents.
#pragma once

#include "common/block.cuh"

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

    // Adds the mask to the scores of a tile of keys; scores of hidden keys become -inf.
    template <int Keys>
    DEVICE void apply(Accumulator<Keys>& scores, int first_key) const {
#pragma unroll
        for (int i = 0; i < scores.kBlocks; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int side = 0; side < 2; ++side) {
                    const float b = bias(half, first_key + column_of(i, side));
                    float& score = scores.at(i, half, side);
                    // A sum would be NaN if the score of a hidden key is +inf.
                    score = b == -kInfinity ? -kInfinity : score + b;
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

// Turns scores into weights, given lse in units of log2. Weights of hidden keys are 0.
template <int Keys>
DEVICE void exponentiate(Accumulator<Keys>& scores, const float (&log2_sum)[2]) {
#pragma unroll
    for (int i = 0; i < scores.kBlocks; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e)
            scores.value[i][e] = fast_exp2(scores.value[i][e] - log2_sum[e / 2]);
}

// Online softmax over tiles of keys (FlashAttention-2, arXiv 2307.08691).
struct OnlineSoftmax {
    float max[2] = {-kInfinity, -kInfinity};  // of the scores so far
    float sum[2] = {0, 0};                    // of the weights in this thread's columns

    // Turns scores into weights relative to the maximum so far. `rescaling` becomes the factor of
    // each row that brings earlier weights to the new maximum.
    template <int Keys>
    DEVICE void update(Accumulator<Keys>& scores, float (&rescaling)[2]) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float tile_max = scores.at(0, half, 0);
#pragma unroll
            for (int i = 0; i < scores.kBlocks; ++i)
                tile_max = fmaxf(tile_max, fmaxf(scores.at(i, half, 0), scores.at(i, half, 1)));
            const float new_max = fmaxf(max[half], quad_max(tile_max));
            // In a row that has seen no key the weights are exp2(-inf - 0) = 0.
            const float subtrahend = new_max == -kInfinity ? 0 : new_max;
            rescaling[half] = fast_exp2(max[half] - subtrahend);
            max[half] = new_max;

            sum[half] *= rescaling[half];
#pragma unroll
            for (int i = 0; i < scores.kBlocks; ++i)
#pragma unroll
                for (int side = 0; side < 2; ++side) {
                    float& score = scores.at(i, half, side);
                    score = fast_exp2(score - subtrahend);
                    sum[half] += score;
                }
        }
    }
};

// P∘(T − c), rounded, with a reference c for each row. A common offset of T along a row cancels in
// tO, but it would increase the rounding error of P∘T, so it is subtracted first: c is the mean of
// T over the visible keys of the first tile that has any.
//
// Each row has two sums. tO is centred with the sum of the rounded values, which cancels part of
// their rounding error; mu uses the sum of the exact values.
struct TangentWeights {
    float reference[2] = {0, 0};
    bool known[2] = {false, false};
    RowSums rounded_sum;          // of the rounded P∘(T − c)
    float exact_sum[2] = {0, 0};  // of P∘(T − c) in this thread's columns

    // Sets c from the first tile with visible keys. `scores` are -inf for hidden keys; `tangents`
    // lack the softmax scale.
    template <int Keys>
    DEVICE void set_reference(const Accumulator<Keys>& scores, const Accumulator<Keys>& tangents,
                              float scale) {
        if (!warp_any(!known[0] || !known[1])) return;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float total = 0, count = 0;
#pragma unroll
            for (int i = 0; i < scores.kBlocks; ++i)
#pragma unroll
                for (int side = 0; side < 2; ++side) {
                    const bool visible = scores.at(i, half, side) != -kInfinity;
                    total += visible ? tangents.at(i, half, side) : 0;
                    count += visible ? 1 : 0;
                }
            total = quad_sum(total);
            count = quad_sum(count);
            if (!known[half] && count > 0) {
                reference[half] = total / count * scale;
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
