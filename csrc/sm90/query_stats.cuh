// The statistics of a tile of queries, for the kernels of dK and dV, whose rows are keys and whose
// columns are queries. One warp loads them into shared memory, where the other warps read them.
#pragma once

#include "common/softmax.cuh"
#include "sm90/ptx.cuh"

namespace jvp_attn::sm90 {

// Four float32 in shared memory: two statistics of two successive queries.
using QueryStats = Accumulator<8>;

DEVICE QueryStats load_query_stats(SharedAddress address) {
    QueryStats stats;
    stats.set_words(0, shared_load_words4(address));
    return stats;
}

// In memory: lse and delta, or with kJvp lse and mu, then beta and delta, as QueryStats of each two
// queries; lse_lo; 1 if scores are centred, otherwise 0.
template <int Rows, bool kJvp>
struct QueryStatsTile {
    static constexpr int kLowParts = (kJvp ? 4 : 2) * Rows * 4;
    static constexpr int kCentres = kLowParts + Rows * 4;
    static constexpr int kBytes = kCentres + 16;

    SharedAddress start;

    // Stores the statistics of the queries from `first_row` on. A warp calls it. Beyond the last
    // query they are those of a query that sees no key.
    DEVICE void store(const AttentionParams& p, const SeqlenInfo& sequence, int head,
                      int first_row) const {
        const auto value = [&](const RowVector& x, int row, float missing = 0) {
            const bool exists = x.data && first_row + row < sequence.queries;
            const float* const source = sequence.rows_of(x, opaque(head)) + first_row + row;
            return exists ? global_load(source) : missing;
        };
        bool huge = false;
#pragma unroll 1
        for (int row = lane_index(); row < Rows; row += 32) {
            huge |= is_huge_lse(value(p.lse, row));
            const int i = row / 8, pair = row / 2 % 4, side = row % 2;
            shared_store_float(address_of_lse_lo(i / 2, pair) + 4 * (i % 2 * 2 + side),
                               value(p.lse_lo, row));
        }
        const bool centres = warp_any(huge);
        if (lane_index() == 0) shared_store_float(start + kCentres, centres ? 1 : 0);
#pragma unroll 1
        for (int pair = lane_index(); pair < Rows / 2; pair += 32) {
            QueryStats stats;
#pragma unroll
            for (int side = 0; side < 2; ++side) {
                const int row = 2 * pair + side;
                stats.value[0][side] = subtrahend_of(value(p.lse, row, -kInfinity), centres);
                stats.value[0][2 + side] = value(kJvp ? p.mu : p.delta, row);
            }
            shared_store_words4(address_of(0, pair), stats.words(0));
            if (kJvp) {
#pragma unroll
                for (int side = 0; side < 2; ++side) {
                    stats.value[0][side] = value(p.beta, 2 * pair + side);
                    stats.value[0][2 + side] = value(p.delta, 2 * pair + side);
                }
                shared_store_words4(address_of(1, pair), stats.words(0));
            }
        }
    }

    // The statistics of the two queries of a thread in columns 8 i to 8 i + 7: lse and delta, or
    // with kJvp lse and mu (which = 0) or beta and delta (which = 1). lse is what is subtracted
    // from scores.
    DEVICE QueryStats load(int which, int i) const {
        return load_query_stats(address_of(which, 4 * i + lane_index() % 4));
    }

    // lse_lo of the two queries of a thread in columns 16 i to 16 i + 7, and in the next 8 columns.
    DEVICE QueryStats load_lse_lo(int i) const {
        return load_query_stats(address_of_lse_lo(i, lane_index() % 4));
    }

    // Whether scores are centred, because a query has a huge lse.
    DEVICE bool centres() const { return shared_load_float(start + kCentres) != 0; }

private:
    DEVICE SharedAddress address_of(int which, int pair) const {
        return start + (which * Rows / 2 + pair) * 16;
    }

    // It differs from `address_of` by a constant, which saves registers.
    DEVICE SharedAddress address_of_lse_lo(int i, int pair) const {
        return start + kLowParts + (4 * i + pair) * 16;
    }
};

// Turns products of keys x queries into weights; those of hidden keys are 0. first_key() returns
// the warp's first key.
template <int Rows, int Keys, bool kJvp, class FirstKey>
DEVICE void exponentiate_transposed(Accumulator<Rows>& scores, float scale,
                                    const KeyBlock<Keys>& block, int first_row,
                                    const QueryStatsTile<Rows, kJvp>& stats,
                                    const FirstKey& first_key) {
    if (stats.centres()) {
#pragma unroll
        for (int i = 0; i < scores.kBlocks; ++i) {
            const QueryStats lse = stats.load(0, i), lse_lo = stats.load_lse_lo(i / 2);
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int side = 0; side < 2; ++side) {
                    float& score = scores.at(i, half, side);
                    score = centred(multiply_rn(score, scale), lse.value[0][side],
                                    lse_lo.value[0][i % 2 * 2 + side]);
                }
        }
    } else {
#pragma unroll
        for (int i = 0; i < scores.kBlocks; ++i) {
            const QueryStats lse = stats.load(0, i);
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int side = 0; side < 2; ++side) {
                    float& score = scores.at(i, half, side);
                    score = fmaf(score, scale * kLog2E, -lse.value[0][side]);
                }
        }
    }
    if (block.hides_keys(first_row)) block.hide(scores, first_key(), first_row);
    scores.exp2();
}

}  // namespace jvp_attn::sm90
