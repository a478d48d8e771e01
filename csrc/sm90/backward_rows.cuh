// What the backward knows of the two rows of a thread, where rows are queries. The kernels of 8.0
// know it in a way of their own, in ../sm80/backward_dq.cuh: with this one, some of them spill.
#pragma once

#include "common/seqlen.cuh"

namespace jvp_attn::sm90 {

// A statistic of a row; `missing` where there is none.
template <int Rows>
DEVICE float value_of_row(const RowBlock<Rows>& block, const RowVector& x, int row,
                          float missing = 0) {
    const bool exists = x.data && row < block.sequence.queries;
    return exists ? global_load(block.statistic(x) + row) : missing;
}

// What is known beforehand.
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

// delta and beta carry the rounding of P inside O and tO. What the rows of dS and dT sum to
// tells by how much: it would be the cotangents of lse and mu. A thread gives its share of the
// sums.
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
