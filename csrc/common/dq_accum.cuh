// dq_accum: the float32 sums in which several blocks of keys accumulate dQ. The backward kernel of
// compute capability 9.0 adds to it, and bwd_postprocess reads it.
//
// The rows of each sequence begin at a multiple of kDqAccumRowMultiple. A block of 16 rows by 8
// columns is contiguous, in the order of an accumulator: the four values of a thread are 16 bytes,
// those of a warp 512. ds_row_sums has one value for each of the same rows: the row sum of dS.
#pragma once

#include "common/limits.h"
#include "common/seqlen.cuh"

namespace jvp_attn {

struct DqAccum {
    static constexpr int kBlockFloats = 128;  // 16 rows by 8 columns

    float* dq;
    float* row_sums;
    int64_t first_row;  // of the sequence
    int column_blocks;  // of 8

    DEVICE DqAccum(const AttentionParams& p, const SeqlenInfo& sequence, int head)
        : first_row(0), column_blocks(ceil_div(p.head_dim, 8)) {
        if (p.cu_seqlens_q)
            first_row =
                (sequence.first_query / kDqAccumRowMultiple + sequence.batch) * kDqAccumRowMultiple;
        const auto of_head = [&](const RowVector& x) {
            return x.data + sequence.batch * x.batch_stride + head * x.head_stride;
        };
        dq = of_head(p.dq_accum);
        row_sums = of_head(p.ds_row_sums);
    }

    // The four values of this thread in 8 columns of the 16 rows from `row` on, a multiple of 16.
    // The next 8 columns are kBlockFloats further.
    DEVICE float* block(int row, int column_block) const {
        const int64_t rows = (first_row + row) / 16;
        return dq + (rows * column_blocks + column_block) * kBlockFloats + lane_index() * 4;
    }

    DEVICE float* row_sum(int row) const { return row_sums + first_row + row; }
};

}  // namespace jvp_attn
