// Where several blocks of keys add up the gradient of Q, in float32: one kernel adds, the next
// reads.
//
// The rows of a sequence begin at a multiple of 128, and so do those that pad them. 16 rows by 8
// columns are together, in the order of an accumulator: the four numbers of a thread are 16 bytes,
// those of a warp 512. The sums of the rows of Sbar go by the same rows, one number each.
#pragma once

#include "problem.cuh"

namespace jvp_attn {

struct GradQSums {
    static constexpr int kRowMultiple = 128;  // jvp_attn/kernel_call.py allocates by it

    static constexpr int kBlockFloats = 128;  // 16 rows by 8 columns

    float* products;
    float* totals;
    int column_blocks;

    DEVICE GradQSums(const AttentionParams& p, const Sequence& sequence, int head)
        : column_blocks(ceil_div(p.head_dim, 8)) {
        const int64_t first_row =
            p.cu_seqlens_q ? (sequence.first_query / kRowMultiple + sequence.batch) * kRowMultiple
                           : 0;
        const auto start = [&](const RowVector& x) {
            return x.data + sequence.batch * x.batch_stride + head * x.head_stride;
        };
        products = start(p.grad_q_sums) + first_row / 16 * column_blocks * kBlockFloats;
        totals = start(p.sbar_sums) + first_row;
    }

    // Four numbers of this thread, of the 16 rows from `row`, a multiple of 16, on. Those of the
    // next 8 columns are kBlockFloats further.
    DEVICE float* block(int row, int column_block) const {
        return products + (int64_t{row / 16} * column_blocks + column_block) * kBlockFloats +
               lane_index() * 4;
    }
};

}  // namespace jvp_attn
