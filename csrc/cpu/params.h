// What every attention map on a CPU is given: one plain struct. The names are those of
// jvp_attn/types.py. A null pointer means that a tensor is absent: an absent input is zero and
// costs nothing, an absent output is not computed.
#pragma once

#include <cstdint>

namespace jvp_attn::cpu {

enum class Element : int32_t { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3, boolean = 4 };

// (batch, row, head, column); columns are contiguous, the other strides, in elements, are free.
// With packed sequences the batch stride is 0 and rows start at cu_seqlens[batch].
struct Tensor {
    void* data = nullptr;
    int64_t batch_stride = 0;
    int64_t row_stride = 0;
    int64_t head_stride = 0;
};

// (batch, head, row) float32, or float64 where the inputs are; rows are contiguous.
struct RowVector {
    void* data = nullptr;
    int64_t batch_stride = 0;
    int64_t head_stride = 0;
};

// (batch, head, row, column); a broadcast dimension has stride 0. A boolean hides a key where it is
// 0, a floating one is added to the scaled scores and hides a key where it is -inf.
struct Mask {
    void* data = nullptr;
    int64_t batch_stride = 0;
    int64_t head_stride = 0;
    int64_t row_stride = 0;
    int64_t column_stride = 0;
    Element element = Element::boolean;
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
    // What rounding took away from out and tout, where their elements are half precision ...
    Tensor out_lo, tout_lo;
    // ... and from lse, where they are float32.
    RowVector lse_lo;
    RowVector lse, mu;  // natural logarithm; -inf and 0 for a row that sees no key

    Tensor grad_out, grad_tout;
    RowVector grad_lse, grad_mu;
    Tensor grad_q, grad_k, grad_v;
    Tensor grad_tq, grad_tk, grad_tv;

    Mask mask, tmask;
    // float32, or float64 where the inputs are; zero at first.
    Mask grad_mask, grad_tmask;

    const int32_t* cu_seqlens_q = nullptr;  // (batch + 1) where each sequence starts and ends
    const int32_t* cu_seqlens_k = nullptr;
    // (batch) keys of each sequence that are used; the others are padding, and their gradients are
    // not written.
    const int32_t* seqused_k = nullptr;

    int32_t batch = 0;  // of sequences, where they are packed
    int32_t heads = 0;
    int32_t heads_k = 0;   // divides heads
    int32_t seqlen_q = 0;  // not read where sequences are packed
    int32_t seqlen_k = 0;
    int32_t head_dim = 0;    // columns of q and k
    int32_t head_dim_v = 0;  // columns of v and out
    double softmax_scale = 1;
    Causal causal = Causal::no;
    Element element = Element::float32;  // of all tensors
    int32_t threads = 1;
};

}  // namespace jvp_attn::cpu
