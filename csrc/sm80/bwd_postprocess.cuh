// The gradient of Q, from what the blocks of keys have added up:
//
//     dQ = s (Σ dS K − (Σ dS − g_lse) k)
//
// Along a row dS sums to g_lse. Rounded it does not, and the mean of K would leak into the
// gradient. What is too much is taken back at k, the mean of the first keys that the row sees.
#pragma once

#include "common/dq_accum.cuh"

namespace jvp_attn {

template <class Element>
struct BwdPostprocess {
    static constexpr int kRows = 64;  // 16 of each warp
    static constexpr int kThreads = kRows / 16 * 32;
    static constexpr int kSharedBytes = 0;
    static constexpr int kFirstKeys = 16;  // whose mean is k

    static int64_t blocks(const AttentionParams& p) { return RowBlock<kRows>::count(p); }

    DEVICE static void run(const AttentionParams& p) {
        const RowBlock<kRows> block(p);
        const int first_row = block.first_row + 16 * warp_index();
        if (first_row >= block.sequence.queries) return;
        const DqAccum sums(p, block.sequence, block.head);
        const Words4 shares = shares_of_keys(p, block, sums, first_row).fragment(0);
        const GmemView k = block.keys_of(p.k, p.head_dim);
        const GmemView grad_q = block.rows_of(p.grad_q, p.head_dim);

        for (int i = 0; i < sums.column_blocks; ++i) {
            Accumulator<8> sum;
            sum.set_words(0, global_load(reinterpret_cast<Words4*>(sums.block(first_row, i))));
            multiply_add<Element>(sum.value[0], shares, pair_of_keys(k, 0, i),
                                  pair_of_keys(k, 8, i));
            sum.scale(p.softmax_scale);
#pragma unroll
            for (int half = 0; half < 2; ++half)
                store_pair(grad_q, first_row + row_in_warp(half), column_of(i, 0),
                           pack<Element>(sum.at(0, half, 0), sum.at(0, half, 1)));
        }
    }

private:
    // What each of the first keys is to be multiplied with.
    DEVICE static Packed<Element, kFirstKeys> shares_of_keys(const AttentionParams& p,
                                                             const RowBlock<kRows>& block,
                                                             const DqAccum& sums, int first_row) {
        const float* const grad_lse = block.statistic(p.grad_lse);
        Packed<Element, kFirstKeys> shares;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = first_row + row_in_warp(half);
            const int visible = min(block.sequence.visible_keys(row), kFirstKeys);
            float share = 0;
            if (visible > 0) {
                const float expected = grad_lse ? global_load(grad_lse + row) : 0;
                share = (expected - global_load(sums.total(row))) / visible;
            }
#pragma unroll
            for (int i = 0; i < shares.kBlocks; ++i)
                shares.set(i, half, column_of(i, 0) < visible ? share : 0,
                           column_of(i, 1) < visible ? share : 0);
        }
        return shares;
    }

    // Of two successive keys of a thread, from `first` on, a column of 8.
    DEVICE static uint32_t pair_of_keys(const GmemView& k, int first, int block) {
        const int key = first + column_of(0, 0), column = 8 * block + row_in_warp(0);
        const auto element = [&](int row) -> uint32_t {
            return row < k.rows && column < k.columns ? global_load(k.element(row, column)) : 0;
        };
        return element(key) | element(key + 1) << 16;
    }
};

}  // namespace jvp_attn
