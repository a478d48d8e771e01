// The parameters of the kernels of compute capability 9.0, and the attention problems that these
// kernels cannot compute.
//
// jvp_attn/backends/kernel_call.py chooses kernels by the same rules; here an unsupported problem
// is an error.
#pragma once

#include <cstdint>
#include <string>

#include "common/limits.h"
#include "params.h"
#include "sm90/ptx.cuh"

namespace jvp_attn::sm90 {

// ---------------------------------------------------------------------------------------------
// Parameters

// TMA descriptors of the inputs, named as in AttentionParams; unset if the tensor is absent.
struct TensorMaps {
    TensorMap q, k, v;
    TensorMap tq, tk, tv;
    TensorMap grad_out, grad_tout;
};

// One plain struct, passed by value.
struct Params {
    static constexpr int kCapability = 90;  // compute capability of its kernels

    TensorMaps maps = {};
    AttentionParams attention;
    int32_t work_tiles = 0;
    int32_t blocks = 0;  // of the grid
};

// The TMA reads an absent tensor as zeros: the kernels load rows of another tensor that are far
// beyond its end.
constexpr int kOutOfBounds = 1 << 30;

// ---------------------------------------------------------------------------------------------
// Checks, on the host

// The sizes in memory of the tensors of queries, or of those of keys.
struct Extent {
    int64_t rows, heads, batches;

    Extent(const AttentionParams& p, bool of_keys) {
        const bool packed = of_keys ? p.cu_seqlens_k : p.cu_seqlens_q;
        rows = of_keys ? (packed ? p.total_k : p.seqlen_k) : (packed ? p.total_q : p.seqlen_q);
        heads = of_keys ? p.heads_k : p.heads;
        batches = packed ? 1 : p.batch;
    }
};

// Why the kernels cannot load or store a tensor kTmaAlignmentBytes at a time; empty if they can. A
// dimension of size 1 may have any stride.
inline std::string why_not_aligned(const char* name, const Tensor& x, const Extent& extent) {
    if (reinterpret_cast<std::uintptr_t>(x.data) % kTmaAlignmentBytes != 0)
        return std::string(name) + " must start at a multiple of " +
               std::to_string(kTmaAlignmentBytes) + " bytes";
    const auto suits = [](int64_t size, int64_t stride) {
        return size == 1 || (stride > 0 && stride % kTmaAlignmentElements == 0);
    };
    if (suits(extent.rows, x.row_stride) && suits(extent.heads, x.head_stride) &&
        suits(extent.batches, x.batch_stride))
        return "";
    return std::string(name) + " has strides " + std::to_string(x.batch_stride) + ", " +
           std::to_string(x.row_stride) + " and " + std::to_string(x.head_stride) +
           " of batches, rows and heads; each must be a positive multiple of " +
           std::to_string(kTmaAlignmentElements) + " elements";
}

// Why a kernel for head dims up to `max_head_dim` cannot compute a problem; empty if it can.
inline std::string why_not(const AttentionParams& p, int max_head_dim) {
    if (p.mask.kind != MaskKind::none) return "there is a mask, which it does not read";
    if (!(p.softmax_scale > 0))
        return "softmax_scale is " + std::to_string(p.softmax_scale) + "; it must be positive";
    for (const auto& [name, head_dim] : {std::pair<const char*, int>{"head_dim", p.head_dim},
                                         std::pair<const char*, int>{"head_dim_v", p.head_dim_v}})
        if (head_dim <= 0 || head_dim % kTmaAlignmentElements != 0 || head_dim > max_head_dim)
            return std::string(name) + " is " + std::to_string(head_dim) +
                   "; it must be a multiple of " + std::to_string(kTmaAlignmentElements) +
                   ", up to " + std::to_string(max_head_dim);

    const Extent queries(p, false), keys(p, true);
    for (const Extent& extent : {queries, keys})
        if (extent.rows < 1 || extent.rows >= kOutOfBounds)
            return "a tensor has " + std::to_string(extent.rows) + " rows; it must have 1 to " +
                   std::to_string(kOutOfBounds - 1);

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
            if (std::string error = why_not_aligned(name, tensor, extent); !error.empty())
                return error;
    return "";
}

// Why dQ cannot be accumulated; empty if it can. The kernel adds four float32 at a time.
inline std::string why_no_dq_accum(const AttentionParams& p) {
    if (!p.dq_accum.data || !p.ds_row_sums.data)
        return "dq_accum and ds_row_sums must be given, filled with zeros";
    const auto start = reinterpret_cast<std::uintptr_t>(p.dq_accum.data);
    if (start % 16 != 0 || p.dq_accum.batch_stride % 4 != 0 || p.dq_accum.head_stride % 4 != 0)
        return "the heads of dq_accum must start at multiples of 16 bytes";
    return "";
}

}  // namespace jvp_attn::sm90
