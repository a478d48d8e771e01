// Backward postprocess: dQ from dq_accum and ds_row_sums, in which the backward kernel of compute
// capability 9.0 has accumulated dS K and rowsum(dS).
//
//     dQ = s (dS K − (rowsum(dS) − dlse) k)
//
// In exact arithmetic a row of dS sums to dlse. Rounded rows do not, and the mean of K would leak
// into dQ. The excess is subtracted at k, the mean of the first keys that the row sees.
#pragma once

#include "common/block.cuh"
#include "common/dq_accum.cuh"

namespace jvp_attn {

template <class Element>
struct BwdPostprocess {
    static constexpr int kRows = 64;  // a warp has 16
    static constexpr int kThreads = kRows / 16 * 32;
    static constexpr int kSharedBytes = 0;
    static constexpr int kFirstKeys = 16;  // k is the mean of the visible ones

    static int64_t blocks(const AttentionParams& p) { return RowBlock<kRows>::count(p); }

    DEVICE static void run(const AttentionParams& p) {
        const RowBlock<kRows> block(p);
        const int first_row = block.first_row + 16 * warp_index();
        if (first_row >= block.sequence.queries) return;
        const DqAccum accum(p, block.sequence, block.head);
        const Words4 shares = shares_of_keys(p, block, accum, first_row).fragment(0);
        const GmemView k = block.keys_of(p.k, p.head_dim);
        const GmemView grad_q = block.rows_of(p.grad_q, p.head_dim);

        for (int i = 0; i < accum.column_blocks; ++i) {
            Accumulator<8> sum;
            sum.set_words(0, global_load(reinterpret_cast<Words4*>(accum.block(first_row, i))));
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
    // The factor of each of the first keys: the negative excess, shared among those that are
    // visible.
    DEVICE static Packed<Element, kFirstKeys> shares_of_keys(const AttentionParams& p,
                                                             const RowBlock<kRows>& block,
                                                             const DqAccum& accum, int first_row) {
        const float* const grad_lse = block.statistic(p.grad_lse);
        Packed<Element, kFirstKeys> shares;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = first_row + row_in_warp(half);
            const int visible = min(block.sequence.visible_keys(row), kFirstKeys);
            float share = 0;
            if (visible > 0) {
                const float expected = grad_lse ? global_load(grad_lse + row) : 0;
                share = (expected - global_load(accum.row_sum(row))) / visible;
            }
#pragma unroll
            for (int i = 0; i < shares.kBlocks; ++i)
                shares.set(i, half, column_of(i, 0) < visible ? share : 0,
                           column_of(i, 1) < visible ? share : 0);
        }
        return shares;
    }

    // One column of two successive keys of a thread: of keys `first` to `first` + 7 and columns 8
    // block to 8 block + 7.
    DEVICE static uint32_t pair_of_keys(const GmemView& k, int first, int block) {
        const int key = first + column_of(0, 0), column = 8 * block + row_in_warp(0);
        const auto element = [&](int row) -> uint32_t {
            return row < k.rows && column < k.columns ? global_load(k.element(row, column)) : 0;
        };
        return element(key) | element(key + 1) << 16;
    }
};

}  // namespace jvp_attn
