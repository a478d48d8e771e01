// What the backward knows of the two rows of a thread, where rows are queries.
#pragma once

#include "problem.cuh"

namespace jvp_attn {

// What the rows of Sbar or Tbar sum to, before and after rounding.
struct RowTotals {
    float exact_share[2] = {0, 0};  // of this thread
    RowSums rounded_sums;

    DEVICE float exact(int half) const { return quad_sum(exact_share[half]); }
    DEVICE float rounded(int half) const { return rounded_sums.at(half); }

    // Rounds the product of weights and x, and adds its rows.
    template <class Element, int Keys>
    DEVICE void add_product(Packed<Element, Keys>& product, const Accumulator<Keys>& weights,
                            const Accumulator<Keys>& x) {
#pragma unroll
        for (int i = 0; i < x.kBlocks; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float low = weights.at(i, half, 0) * x.at(i, half, 0);
                const float high = weights.at(i, half, 1) * x.at(i, half, 1);
                product.set(i, half, low, high);
                exact_share[half] += low + high;
            }
        rounded_sums.add(product);
    }
};

// A statistic of a row; `missing` where there is none.
template <int Rows>
DEVICE float value_of_row(const RowBlock<Rows>& block, const RowVector& x, int row,
                          float missing = 0) {
    const bool exists = x.data && row < block.sequence.queries;
    return exists ? global_load(block.statistic(x) + row) : missing;
}

// What is known beforehand.
template <bool kFull>
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
            if (kFull) mu[half] = value_of_row(block, p.mu, row);
            if (kFull) beta[half] = value_of_row(block, p.beta, row);
        }
    }

    DEVICE bool sees_no_key(int half) const { return log2_sum[half] == kInfinity; }

    // delta and beta carry the rounding of P inside O and tO. The rows of Sbar and Tbar tell by how
    // much: they would sum to the cotangents of lse and mu.
    template <int Rows>
    DEVICE void sharpen(const RowBlock<Rows>& block, int first_row, const RowVector& statistic,
                        const float (&known)[2], const RowTotals& totals,
                        const RowVector& cotangent) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = first_row + row_in_warp(half);
            const float excess = totals.exact(half) - value_of_row(block, cotangent, row);
            if (lane_index() % 4 == 0 && !sees_no_key(half))
                global_store(block.statistic(statistic) + row, known[half] + excess);
        }
    }
};

}  // namespace jvp_attn

