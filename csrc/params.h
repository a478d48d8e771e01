// What every attention kernel is given: one plain struct, passed by value.
//
// The names are those of jvp_attn/types.py. A null pointer means that a tensor is absent: an absent
// input is zero, and an absent output is not written. The kernels of compute capability 8.0 leave
// out what an absent input would be multiplied with; those of 9.0 multiply zeros, which takes as
// long as with any other input, but for forward_jvp_q, which is for absent tk and tv.
#pragma once

#include <cstdint>

namespace jvp_attn {

// (batch, row, head, column) 2-byte elements; columns are contiguous, the other strides are free.
// With packed sequences the batch stride is 0 and rows start at cu_seqlens[batch].
struct Tensor {
    void* data = nullptr;
    int64_t batch_stride = 0;  // in elements, as all strides
    int64_t row_stride = 0;
    int64_t head_stride = 0;
};

// (batch, head, row) float32; rows are contiguous.
struct RowVector {
    float* data = nullptr;
    int64_t batch_stride = 0;
    int64_t head_stride = 0;
};

enum class MaskKind : int32_t {
    none = 0,
    boolean = 1,           // one byte; a key attends where it is not 0
    additive_element = 2,  // of the inputs' dtype, added to the scaled scores; -inf hides a key
    additive_float32 = 3,
};

// (batch, head, row, column); a broadcast dimension has stride 0.
struct Mask {
    const void* data = nullptr;
    int64_t batch_stride = 0;
    int64_t head_stride = 0;
    int64_t row_stride = 0;
    int64_t column_stride = 0;
    MaskKind kind = MaskKind::none;
};

enum class Causal : int32_t {
    no = 0,
    bottom_right = 1,  // row i sees column j where j <= i + seqlen_k - seqlen_q (flash-attn)
    top_left = 2,      // row i sees column j where j <= i (torch's scaled_dot_product_attention)
};

struct AttentionParams {
    Tensor q, k, v;
    Tensor tq, tk, tv;
    Tensor out, tout;
    // What rounding to the elements' dtype took away from out and tout, in that dtype again.
    Tensor out_lo, tout_lo;
    RowVector lse, mu;  // natural logarithm; -inf and 0 for a row that sees no key

    Tensor grad_out, grad_tout;
    RowVector grad_lse, grad_mu;
    RowVector beta, delta;  // from the preprocess kernel; the kernel of grad_q sharpens them
    Tensor grad_q, grad_k, grad_v;
    Tensor grad_tq, grad_tk, grad_tv;
    // What several blocks add up for grad_q, zeros before; csrc/common/dq_accum.cuh says what is
    // where.
    RowVector dq_accum, ds_row_sums;

    Mask mask;
    const int32_t* cu_seqlens_q = nullptr;  // (batch + 1) where each sequence starts and ends
    const int32_t* cu_seqlens_k = nullptr;
    const int32_t* seqused_k = nullptr;  // (batch) keys beyond these are padding: gradient 0

    int32_t batch = 0;
    int32_t heads = 0;
    int32_t heads_k = 0;   // divides heads
    int32_t seqlen_q = 0;  // of the longest sequence, where sequences are packed
    int32_t seqlen_k = 0;
    int32_t total_q = 0;  // rows of all sequences together, where they are packed
    int32_t total_k = 0;
    int32_t head_dim = 0;    // columns of q and k; at most the kernel's own
    int32_t head_dim_v = 0;  // columns of v and out; likewise
    float softmax_scale = 1;
    Causal causal = Causal::no;
};

}  // namespace jvp_attn
