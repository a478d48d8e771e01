// Scores and their tangents, for a warp whose 16 rows are queries and whose columns are keys: as in
// ../softmax.cuh, without masks.
//
// Scores lack the softmax scale, which is positive: one instruction scales them to units of log2
// and subtracts the maximum.
#pragma once

#include "common/softmax.cuh"

namespace jvp_attn::sm90 {

// Which keys the queries of a warp see.
struct CausalMask {
    const SeqlenInfo& sequence;
    int first_query;

    // How many keys, counted from the first, a query of this thread sees. To store_smem it would
    // cost registers in loops that rarely ask.
    DEVICE int end(int half) const {
        return sequence.visible_keys(first_query + opaque(lane_index()) / 4 + 8 * half);
    }

    // Replaces what belongs to hidden keys, of the keys from `first_key` on.
    template <int Keys>
    DEVICE void apply(Accumulator<Keys>& x, int first_key, float value) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            // Compared with what is known at compile time.
            const int visible = end(half) - first_key - column_of(0, 0);
#pragma unroll
            for (int i = 0; i < x.kBlocks; ++i)
#pragma unroll
                for (int side = 0; side < 2; ++side)
                    if (8 * i + side >= visible) x.at(i, half, side) = value;
        }
    }
};

// Softmax over tiles of keys, one after the other (FlashAttention-2, arXiv 2307.08691).
struct OnlineSoftmax {
    float max[2] = {-kInfinity, -kInfinity};  // of the scores so far
    float sum[2] = {0, 0};                    // this thread's share of the sum of weights

    // Scores become weights relative to the maximum so far. Returns, for each row, the factor that
    // brings older weights to the new maximum.
    template <int Keys>
    DEVICE void update(Accumulator<Keys>& scores, float log2_scale, float (&rescaling)[2]) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float tile_max = scores.at(0, half, 0);
#pragma unroll
            for (int i = 0; i < scores.kBlocks; ++i)
                tile_max = fmaxf(tile_max, fmaxf(scores.at(i, half, 0), scores.at(i, half, 1)));
            const float new_max = fmaxf(max[half], quad_max(tile_max));
            // A row that has seen no key: its weights are exp2(-inf - 0) = 0.
            const float subtrahend = new_max == -kInfinity ? 0 : new_max * log2_scale;
            rescaling[half] = fast_exp2(max[half] * log2_scale - subtrahend);
            max[half] = new_max;

            sum[half] *= rescaling[half];
#pragma unroll
            for (int i = 0; i < scores.kBlocks; ++i)
#pragma unroll
                for (int side = 0; side < 2; ++side) {
                    float& score = scores.at(i, half, side);
                    score = fast_exp2(score * log2_scale - subtrahend);
                    sum[half] += score;
                }
        }
    }

    // Stores the lse of the warp's rows, and returns what their outputs are to be multiplied with.
    template <int Rows>
    DEVICE void finish(const AttentionParams& p, const RowBlock<Rows>& block, int first_row,
                       float (&normalisation)[2]) const {
        float* const lse = block.statistic(p.lse);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float total = quad_sum(sum[half]);
            const bool sees_no_key = total == 0;
            normalisation[half] = sees_no_key ? 0 : 1 / total;
            const int row = first_row + row_in_warp(half);
            if (lane_index() % 4 == 0 && row < block.sequence.queries)
                global_store(lse + row, sees_no_key
                                            ? -kInfinity
                                            : max[half] * p.softmax_scale + log2f(total) * kLn2);
        }
    }
};

// P∘(T − c) with a reference c per row, rounded, and two sums of each row: as TangentWeights of
// ../softmax.cuh, but for the reference, which the first tile gives, and for products of warps,
// which do not go together with those of warpgroups.
struct TangentWeights {
    float reference[2] = {0, 0};
    float rounded_sum[2] = {0, 0};  // this thread's share of those of the rounded P∘(T − c)
    float exact_sum[2] = {0, 0};    // and of P∘(T − c)

    // Tangents are those of the first tile, 0 where a key is hidden, and lack the softmax scale.
    template <int Keys>
    DEVICE void set_reference(const Accumulator<Keys>& tangents, const CausalMask& horizon,
                              float scale) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float total = 0;
#pragma unroll
            for (int i = 0; i < tangents.kBlocks; ++i)
                total += tangents.at(i, half, 0) + tangents.at(i, half, 1);
            const int visible = min(horizon.end(half), Keys);
            reference[half] = quad_sum(total) / max(visible, 1) * scale;
        }
    }

    // Brings older weights to a new scale.
    DEVICE void rescale(const float (&factor)[2]) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            rounded_sum[half] *= factor[half];
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
                const float low =
                    product(weights.at(i, half, 0), tangents.at(i, half, 0) * scale - c);
                const float high =
                    product(weights.at(i, half, 1), tangents.at(i, half, 1) * scale - c);
                weighted.set(i, half, low, high);
                exact_sum[half] += low + high;
                rounded_sum[half] += weighted.low(i, half) + weighted.high(i, half);
            }
    }

private:
    // The tangent of a hidden key's score may be infinite, and 0 · inf is NaN.
    DEVICE static float product(float weight, float tangent) {
        return weight == 0 ? 0 : weight * tangent;
    }
};

}  // namespace jvp_attn::sm90
