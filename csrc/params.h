// The parameters of every attention kernel: one plain struct, passed by value.
//
// Fields are named as in jvp_attn/types.py. A null pointer means that a tensor is absent: an absent
// input is zero, an absent output is not written. The kernels of compute capability 8.0 skip
// products with absent inputs. Those of 9.0 multiply by zeros and take the same time, except
// forward_jvp_q, which is for absent tk and tv.
#pragma once

#include <cstdint>

namespace jvp_attn {

// (batch, row, head, column) 2-byte elements; columns are contiguous, other strides are arbitrary.
// For packed sequences the batch stride is 0 and a sequence starts at row cu_seqlens[batch].
struct Tensor {
    void* data = nullptr;
    int64_t batch_stride = 0;  // all strides are in elements
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
    additive_element = 2,  // inputs' dtype, added to the scaled scores; -inf hides a key
    additive_float32 = 3,
};

// (batch_size, head, row, column); a broadcast dimension has stride 0. Example i of the batch has
// entry (i / batch_group) % batch_size.
struct Mask {
    const void* data = nullptr;
    int64_t batch_stride = 0;
    int64_t head_stride = 0;
    int64_t row_stride = 0;
    int64_t column_stride = 0;
    MaskKind kind = MaskKind::none;
    int32_t batch_size = INT32_MAX;
    int32_t batch_group = 1;
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
    Tensor out_lo, tout_lo;  // the low-order parts that rounding took from out and tout
    RowVector lse, mu;       // lse is a natural logarithm; -inf and 0 for a row that sees no key
    RowVector lse_lo;        // the low-order part that rounding took from lse

    Tensor grad_out, grad_tout;
    RowVector grad_lse, grad_mu;
    RowVector beta, delta;  // written by preprocess, corrected by backward_dq
    Tensor grad_q, grad_k, grad_v;
    Tensor grad_tq, grad_tk, grad_tv;
    RowVector dq_accum, ds_row_sums;  // sums of backward, zero at first; common/dq_accum.cuh

    Mask mask;
    const int32_t* cu_seqlens_q = nullptr;  // (batch + 1) boundaries of packed sequences
    const int32_t* cu_seqlens_k = nullptr;
    const int32_t* seqused_k = nullptr;  // (batch) keys in use; the others are padding, gradient 0

    int32_t batch = 0;
    int32_t heads = 0;
    int32_t heads_k = 0;   // divides heads
    int32_t seqlen_q = 0;  // of the longest sequence if packed
    int32_t seqlen_k = 0;
    int32_t total_q = 0;  // rows of all sequences if packed
    int32_t total_k = 0;
    int32_t head_dim = 0;    // columns of q and k, at most the kernel's head dim
    int32_t head_dim_v = 0;  // columns of v and out, at most the kernel's head dim
    float softmax_scale = 1;
    Causal causal = Causal::no;
};

}  // namespace jvp_attn
