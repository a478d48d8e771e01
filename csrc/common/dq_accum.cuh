// Where several blocks of keys add up the gradient of Q, in float32: one kernel adds, the next
// reads.
//
// The rows of a sequence begin at a multiple of 128, and so do those that pad them. 16 rows by 8
// columns are together, in the order of an accumulator: the four numbers of a thread are 16 bytes,
// those of a warp 512. The sums of the rows of dS go by the same rows, one number each.
#pragma once

#include "common/seqlen.cuh"

namespace jvp_attn {

struct DqAccum {
    static constexpr int kRowMultiple = 128;  // jvp_attn/backends/kernel_call.py allocates by it
    static constexpr int kBlockFloats = 128;  // 16 rows by 8 columns

    float* products;
    float* totals;
    int64_t first_row;  // of the sequence
    int column_blocks;  // of 8

    DEVICE DqAccum(const AttentionParams& p, const SeqlenInfo& sequence, int head)
        : first_row(0), column_blocks(ceil_div(p.head_dim, 8)) {
        if (p.cu_seqlens_q)
            first_row = (sequence.first_query / kRowMultiple + sequence.batch) * kRowMultiple;
        const auto of_head = [&](const RowVector& x) {
            return x.data + sequence.batch * x.batch_stride + head * x.head_stride;
        };
        products = of_head(p.dq_accum);
        totals = of_head(p.ds_row_sums);
    }

    // Four numbers of this thread, of the 16 rows from `row`, a multiple of 16, on. Those of the
    // next 8 columns are kBlockFloats further.
    DEVICE float* block(int row, int column_block) const {
        const int64_t rows = (first_row + row) / 16;
        return products + (rows * column_blocks + column_block) * kBlockFloats + lane_index() * 4;
    }

    DEVICE float* total(int row) const { return totals + first_row + row; }
};

}  // namespace jvp_attn
