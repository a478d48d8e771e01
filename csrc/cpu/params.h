// The arguments of the CPU kernels, in one plain struct. The names are those of jvp_attn/types.py.
// A null pointer means that a tensor is absent: an absent input is zero and costs nothing, an
// absent output is not computed. The caller fills gradients with zeros: those of padded keys, and
// those of queries without keys, are not written.
#pragma once

#include <cstdint>

namespace jvp_attn::cpu {

enum class Element : int32_t { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3, boolean = 4 };

// (batch, row, head, column). Columns are contiguous; the other strides, in elements, are
// arbitrary. With packed sequences the batch stride is 0 and rows start at cu_seqlens[batch].
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

// (batch_size, head, row, column); a broadcast dimension has stride 0. Example i of the batch has
// entry (i / batch_group) % batch_size. A boolean mask hides keys where it is 0. A floating point
// mask is added to the scaled scores; -inf hides a key.
struct Mask {
    void* data = nullptr;
    int64_t batch_stride = 0;
    int64_t head_stride = 0;
    int64_t row_stride = 0;
    int64_t column_stride = 0;
    Element element = Element::boolean;
    int32_t batch_size = INT32_MAX;
    int32_t batch_group = 1;

    int entry_of(int batch) const { return batch / batch_group % batch_size; }
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
    Tensor out_lo, tout_lo;  // the low-order parts that rounding took in half precision
    RowVector lse, mu;       // natural logarithm; -inf and 0 in a row without visible keys
    RowVector lse_lo;        // the low-order part that rounding took from lse

    Tensor grad_out, grad_tout;
    RowVector grad_lse, grad_mu;
    Tensor grad_q, grad_k, grad_v;
    Tensor grad_tq, grad_tk, grad_tv;

    Mask mask, tmask;
    // float32, or float64 where the inputs are; the kernels add to them.
    Mask grad_mask, grad_tmask;

    const int32_t* cu_seqlens_q = nullptr;  // (batch + 1) where each sequence starts and ends
    const int32_t* cu_seqlens_k = nullptr;
    // (batch) used keys of each sequence; the keys after these are padding, and seqlen_k in
    // Causal::bottom_right is this number.
    const int32_t* seqused_k = nullptr;

    int32_t batch = 0;  // sequences, if they are packed
    int32_t heads = 0;
    int32_t heads_k = 0;   // divides heads
    int32_t seqlen_q = 0;  // not read if sequences are packed
    int32_t seqlen_k = 0;
    int32_t head_dim = 0;    // columns of q and k
    int32_t head_dim_v = 0;  // columns of v and out
    double softmax_scale = 1;
    Causal causal = Causal::no;
    Element element = Element::float32;  // of all tensors
    int32_t threads = 1;
};

}  // namespace jvp_attn::cpu
