// Softmax of scores and its tangent, for a warp whose 16 rows are queries and whose columns are
// keys: as in common/softmax.cuh, without mask tensors.
//
// Scores here lack the softmax scale, which is positive: one FFMA scales them to units of log2 and
// subtracts the maximum or lse.
#pragma once

#include "common/softmax.cuh"
#include "sm90/ptx.cuh"

namespace jvp_attn::sm90 {

// ---------------------------------------------------------------------------------------------
// Forward

// Hides the keys that a query does not see, by causality or because they are beyond the last key.
struct CausalMask {
    // Two numbers and no more, because loops that rarely use them keep them in registers.
    int first_end;  // causality hides the keys from here on from the warp's first query
    int keys;

    DEVICE CausalMask(const SeqlenInfo& sequence, int first_query)
        : first_end(first_query + 1 + sequence.diagonal), keys(sequence.keys) {}

    // The number of keys that a query of this thread sees; of no meaning beyond the last query.
    DEVICE int end(int half) const {
        return min(max(first_end + opaque(lane_index()) / 4 + 8 * half, 0), keys);
    }

    // Whether a query of the warp does not see all keys before this one.
    DEVICE bool hides_keys_before(int key) const { return key > min(first_end, keys); }

    // Replaces the values of hidden keys in a tile whose first key is `first_key`.
    template <int Keys>
    DEVICE void apply(Accumulator<Keys>& x, int first_key, float value) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            // The loop compares this with compile-time constants.
            const int visible = end(half) - first_key - column_of(0, 0);
#pragma unroll
            for (int i = 0; i < x.kBlocks; ++i)
#pragma unroll
                for (int side = 0; side < 2; ++side)
                    if (8 * i + side >= visible) x.at(i, half, side) = value;
        }
    }
};

// P∘(T − c), rounded, with a reference c and two sums for each row: TangentWeights of
// common/softmax.cuh, but the rounded values are summed without mma, which cannot run next to
// wgmma. c is the mean of T, weighted by P, over the first tile in which the row has a weight that
// is not 0; the kernels say which rows have none yet.
struct TangentWeights {
    float reference[2] = {0, 0};
    float rounded_sum[2] = {0, 0};  // of the rounded P∘(T − c) in this thread's columns
    float exact_sum[2] = {0, 0};    // of P∘(T − c)

    // Sets c of the rows that are `unset` and have weights in this tile; then they are not unset
    // any more. weight(score, half) is the weight of a key: a loop that has no registers to keep
    // weights across this branch computes them here and again behind it. `tangents` lack the
    // softmax scale.
    template <int Keys, class Weight>
    DEVICE void set_reference(bool (&unset)[2], const Accumulator<Keys>& scores,
                              const Weight& weight, const Accumulator<Keys>& tangents,
                              float scale) {
        if (!warp_any(unset[0] || unset[1])) return;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float total = 0, weighted = 0;
#pragma unroll
            for (int i = 0; i < tangents.kBlocks; ++i)
#pragma unroll
                for (int side = 0; side < 2; ++side) {
                    const float w = weight(scores.at(i, half, side), half);
                    total += w;
                    weighted += masked_product(w, tangents.at(i, half, side));
                }
            total = quad_sum(total);
            weighted = quad_sum(weighted);
            const bool sets = unset[half] && total > 0;
            reference[half] = sets ? fast_divide(weighted, total) * scale : reference[half];
            unset[half] = unset[half] && !sets;
        }
    }

    // Rescales the sums to the new maximum of the online softmax.
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
                    masked_product(weights.at(i, half, 0), tangents.at(i, half, 0) * scale - c);
                const float high =
                    masked_product(weights.at(i, half, 1), tangents.at(i, half, 1) * scale - c);
                weighted.set(i, half, low, high);
                exact_sum[half] += low + high;
                rounded_sum[half] += weighted.low(i, half) + weighted.high(i, half);
            }
    }
};

// ---------------------------------------------------------------------------------------------
// Backward

// A statistic of a row; `missing` beyond the last row or if the statistic is absent.
template <int Rows>
DEVICE float value_of_row(const RowBlock<Rows>& block, const RowVector& x, int row,
                          float missing = 0) {
    const bool exists = x.data && row < block.sequence.queries;
    return exists ? global_load(block.statistic(x) + row) : missing;
}

// The statistics of the two rows of a thread. The kernels of compute capability 8.0 load them in
// their own way, in sm80/backward_dq.cuh: with this one some of them spill.
template <bool kJvp>
struct RowStatistics {
    RowLse lse;
    float mu[2] = {0, 0}, beta[2] = {0, 0}, delta[2];

    template <int Rows>
    DEVICE RowStatistics(const AttentionParams& p, const RowBlock<Rows>& block, int first_row)
        : lse(p, block, first_row) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = first_row + row_in_warp(half);
            delta[half] = value_of_row(block, p.delta, row);
            if (kJvp) mu[half] = value_of_row(block, p.mu, row);
            if (kJvp) beta[half] = value_of_row(block, p.beta, row);
        }
    }
};

// Corrects delta or beta for the rounding of P in O and tO. In exact arithmetic the row sums of dS
// and dT equal the cotangents of lse and mu; the difference is the error of delta and beta.
// `shares` are the sums over this thread's columns.
template <int Rows>
DEVICE void correct_delta(const AttentionParams& p, const RowBlock<Rows>& block, int first_row,
                          const RowVector& statistic, const float (&shares)[2],
                          const RowVector& cotangent) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = first_row + row_in_warp(half);
        const float total = quad_sum(shares[half]);
        const bool sees_keys = value_of_row(block, p.lse, row, -kInfinity) != -kInfinity;
        if (!sees_keys || lane_index() % 4 != 0) continue;
        const float excess = total - value_of_row(block, cotangent, row);
        global_store(block.statistic(statistic) + row,
                     value_of_row(block, statistic, row) + excess);
    }
}

}  // namespace jvp_attn::sm90
