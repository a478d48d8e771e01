// Softmax of scores and its tangent, for a warp whose 16 rows are queries and whose columns are
// keys: as in common/softmax.cuh, without mask tensors.
//
// Scores here lack the softmax scale, which is positive: one FFMA scales them to units of log2 and
// subtracts the maximum.
#pragma once

#include "common/softmax.cuh"
#include "sm90/ptx.cuh"

namespace jvp_attn::sm90 {

// ---------------------------------------------------------------------------------------------
// Forward

// Hides the keys that a query does not see, by causality or because they are beyond the last key.
struct CausalMask {
    const SeqlenInfo& sequence;
    int first_query;

    // The number of keys that a query of this thread sees. It is recomputed where it is needed:
    // to keep it would cost registers in loops that rarely use it.
    DEVICE int end(int half) const {
        return sequence.visible_keys(first_query + opaque(lane_index()) / 4 + 8 * half);
    }

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

// Online softmax over tiles of keys (FlashAttention-2, arXiv 2307.08691).
struct OnlineSoftmax {
    float max[2] = {-kInfinity, -kInfinity};  // of the scores so far
    float sum[2] = {0, 0};                    // of the weights in this thread's columns

    // Turns scores into weights relative to the maximum so far. `rescaling` becomes the factor of
    // each row that brings earlier weights to the new maximum.
    template <int Keys>
    DEVICE void update(Accumulator<Keys>& scores, float log2_scale, float (&rescaling)[2]) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float tile_max = scores.at(0, half, 0);
#pragma unroll
            for (int i = 0; i < scores.kBlocks; ++i)
                tile_max = fmaxf(tile_max, fmaxf(scores.at(i, half, 0), scores.at(i, half, 1)));
            const float new_max = fmaxf(max[half], quad_max(tile_max));
            // In a row that has seen no key the weights are exp2(-inf - 0) = 0.
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

    // Stores lse of the warp's rows. `normalisation` becomes the factor of each row of O.
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

// P∘(T − c), rounded, with a reference c and two sums for each row: TangentWeights of
// common/softmax.cuh with two differences. c comes from the first tile of keys, and the rounded
// values are summed without mma, which cannot run next to wgmma.
struct TangentWeights {
    float reference[2] = {0, 0};
    float rounded_sum[2] = {0, 0};  // of the rounded P∘(T − c) in this thread's columns
    float exact_sum[2] = {0, 0};    // of P∘(T − c)

    // Sets c to the mean of the first tile's tangents, which are 0 for hidden keys and lack the
    // softmax scale.
    template <int Keys>
    DEVICE void set_reference(const Accumulator<Keys>& tangents, const CausalMask& causal_mask,
                              float scale) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float total = 0;
#pragma unroll
            for (int i = 0; i < tangents.kBlocks; ++i)
                total += tangents.at(i, half, 0) + tangents.at(i, half, 1);
            const int visible = min(causal_mask.end(half), Keys);
            reference[half] = quad_sum(total) / max(visible, 1) * scale;
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
    float log2_sum[2];  // +inf in a row that sees no key
    float mu[2] = {0, 0}, beta[2] = {0, 0}, delta[2];

    template <int Rows>
    DEVICE RowStatistics(const AttentionParams& p, const RowBlock<Rows>& block, int first_row) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = first_row + row_in_warp(half);
            log2_sum[half] = log2_of_sum(value_of_row(block, p.lse, row, -kInfinity));
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

// Four float32 in shared memory: two statistics of two successive queries, which are columns of a
// tile of keys x queries.
using QueryStats = Accumulator<8>;

DEVICE QueryStats load_query_stats(SharedAddress address) {
    QueryStats stats;
    stats.set_words(0, shared_load_words4(address));
    return stats;
}

// Stores the statistics x and y of the queries `row` and `row` + 1. Beyond the last query they are
// those of a query that sees no key. lse is stored in units of log2.
DEVICE void store_query_stats(SharedAddress address, const SeqlenInfo& sequence, int head, int row,
                              const RowVector& x, const RowVector& y, bool x_is_lse) {
    QueryStats stats;
#pragma unroll
    for (int side = 0; side < 2; ++side) {
        const bool exists = row + side < sequence.queries;
        const auto value = [&](const RowVector& statistic, float missing) {
            return exists ? global_load(sequence.rows_of(statistic, head) + row + side) : missing;
        };
        stats.value[0][side] = x_is_lse ? log2_of_sum(value(x, -kInfinity)) : value(x, 0);
        stats.value[0][2 + side] = value(y, 0);
    }
    shared_store_words4(address, stats.words(0));
}

// Turns the scores of keys x queries into weights; those of hidden keys are 0. stats(i) returns lse
// of the two queries of a thread in columns 8 i to 8 i + 7, in units of log2; first_key() returns
// the warp's first key.
template <int Rows, int Keys, class Stats, class FirstKey>
DEVICE void exponentiate_transposed(Accumulator<Rows>& scores, float log2_scale,
                                    const KeyBlock<Keys>& block, int first_row, const Stats& stats,
                                    const FirstKey& first_key) {
#pragma unroll
    for (int i = 0; i < scores.kBlocks; ++i) {
        const QueryStats lse = stats(i);
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int side = 0; side < 2; ++side) {
                float& score = scores.at(i, half, side);
                score = score * log2_scale - lse.value[0][side];
            }
    }
    if (block.hides_keys(first_row)) block.hide(scores, first_key(), first_row);
    scores.exp2();
}

}  // namespace jvp_attn::sm90
