// What the kernels of compute capability 9.0 cannot do, and those of 8.0 can; host code.
//
// jvp_attn/backends/kernel_call.py chooses between them by the same rules. Here nothing is chosen:
// what cannot be done is an error.
#pragma once

#include <cstdint>
#include <string>

#include "params.h"

namespace jvp_attn::sm90 {

// Rows of an absent tensor are zeros: they are taken from another one, far beyond its end, where
// the TMA reads nothing.
constexpr int kBeyond = 1 << 30;

// How many rows, heads and batches the tensors of queries have in memory, or those of keys.
struct Extent {
    int64_t rows, heads, batches;

    Extent(const AttentionParams& p, bool of_keys) {
        const bool packed = of_keys ? p.cu_seqlens_k : p.cu_seqlens_q;
        rows = of_keys ? (packed ? p.total_k : p.seqlen_k) : (packed ? p.total_q : p.seqlen_q);
        heads = of_keys ? p.heads_k : p.heads;
        batches = packed ? 1 : p.batch;
    }
};

// Why a tensor can be neither loaded nor stored 16 bytes at a time; empty if it can. A dimension of
// 1 may have any stride.
inline std::string why_no_chunks(const char* name, const Tensor& x, const Extent& extent) {
    if (reinterpret_cast<std::uintptr_t>(x.data) % 16 != 0)
        return std::string(name) + " starts beside a multiple of 16 bytes";
    const auto suits = [](int64_t size, int64_t stride) {
        return size == 1 || (stride > 0 && stride % 8 == 0);
    };
    if (suits(extent.rows, x.row_stride) && suits(extent.heads, x.head_stride) &&
        suits(extent.batches, x.batch_stride))
        return "";
    return std::string(name) + " has strides " + std::to_string(x.batch_stride) + ", " +
           std::to_string(x.row_stride) + " and " + std::to_string(x.head_stride) +
           " of batches, rows and heads; each must be a positive multiple of 8 elements";
}

// Why a kernel for head dims up to `max_head_dim` cannot compute a problem; empty if it can.
inline std::string why_not(const AttentionParams& p, int max_head_dim) {
    if (p.mask.kind != MaskKind::none) return "there is a mask, which it would not read";
    if (!(p.softmax_scale > 0))
        return "softmax_scale is " + std::to_string(p.softmax_scale) + "; it must be positive";
    for (const auto& [name, head_dim] : {std::pair<const char*, int>{"head_dim", p.head_dim},
                                         std::pair<const char*, int>{"head_dim_v", p.head_dim_v}})
        if (head_dim < 8 || head_dim % 8 != 0 || head_dim > max_head_dim)
            return std::string(name) + " is " + std::to_string(head_dim) +
                   "; it must be a multiple of 8, up to " + std::to_string(max_head_dim);

    const Extent queries(p, false), keys(p, true);
    for (const Extent& extent : {queries, keys})
        if (extent.rows < 1 || extent.rows >= kBeyond)
            return "a tensor has " + std::to_string(extent.rows) + " rows; it must have 1 to " +
                   std::to_string(kBeyond - 1);

    const struct {
        const char* name;
        const Tensor& tensor;
        const Extent& extent;
    } tensors[] = {
        {"q", p.q, queries},
        {"k", p.k, keys},
        {"v", p.v, keys},
        {"tq", p.tq, queries},
        {"tk", p.tk, keys},
        {"tv", p.tv, keys},
        {"out", p.out, queries},
        {"tout", p.tout, queries},
        {"out_lo", p.out_lo, queries},
        {"tout_lo", p.tout_lo, queries},
        {"grad_out", p.grad_out, queries},
        {"grad_tout", p.grad_tout, queries},
        {"grad_q", p.grad_q, queries},
        {"grad_k", p.grad_k, keys},
        {"grad_v", p.grad_v, keys},
        {"grad_tq", p.grad_tq, queries},
        {"grad_tk", p.grad_tk, keys},
        {"grad_tv", p.grad_tv, keys},
    };
    for (const auto& [name, tensor, extent] : tensors)
        if (tensor.data)
            if (std::string error = why_no_chunks(name, tensor, extent); !error.empty())
                return error;
    return "";
}

// Why there is no place to add up dQ in; empty if there is one. Four numbers are added at a time.
inline std::string why_no_sums(const AttentionParams& p) {
    if (!p.dq_accum.data || !p.ds_row_sums.data)
        return "dq_accum and ds_row_sums must be there, full of zeros";
    const auto start = reinterpret_cast<std::uintptr_t>(p.dq_accum.data);
    if (start % 16 != 0 || p.dq_accum.batch_stride % 4 != 0 || p.dq_accum.head_stride % 4 != 0)
        return "the heads of dq_accum must start at multiples of 16 bytes";
    return "";
}

}  // namespace jvp_attn::sm90
