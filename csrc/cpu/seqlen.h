// The lengths of one sequence, its place in the tensors, and the keys that its queries see.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "cpu/matrix_view.h"

namespace jvp_attn::cpu::JVP_ATTN_ISA {

template <class Value>
constexpr Value kInfinity = std::numeric_limits<Value>::infinity();

struct SeqlenInfo {
    int batch;
    int64_t first_query = 0, first_key = 0;
    int queries;
    int keys;  // the used ones, without padding

    SeqlenInfo(const AttentionParams& p, int batch_index)
        : batch(batch_index), queries(p.seqlen_q), keys(p.seqlen_k), causal_(p.causal) {
        if (p.cu_seqlens_q) {
            first_query = p.cu_seqlens_q[batch];
            queries = p.cu_seqlens_q[batch + 1] - static_cast<int>(first_query);
            first_key = p.cu_seqlens_k[batch];
            keys = p.cu_seqlens_k[batch + 1] - static_cast<int>(first_key);
        }
        if (p.seqused_k) keys = std::clamp(p.seqused_k[batch], 0, keys);
        diagonal_ = causal_ == Causal::bottom_right ? keys - queries : 0;
    }

    // Without a mask, a query sees the keys [0, visible_keys(query)).
    int visible_keys(int query) const {
        if (causal_ == Causal::no) return keys;
        return static_cast<int>(
            std::clamp<int64_t>(int64_t{query} + 1 + diagonal_, 0, int64_t{keys}));
    }

    MatrixView queries_of(const Tensor& x, Element element, int head) const {
        return matrix(x, element, head, first_query);
    }

    MatrixView keys_of(const Tensor& x, Element element, int head) const {
        return matrix(x, element, head, first_key);
    }

    // The elements of one head, such as its lse; null if x is absent.
    template <class Value>
    Value* rows_of(const RowVector& x, int head) const {
        if (!x.data) return nullptr;
        return static_cast<Value*>(x.data) + batch * x.batch_stride + head * x.head_stride +
               first_query;
    }

private:
    Causal causal_;
    int diagonal_;

    MatrixView matrix(const Tensor& x, Element element, int head, int64_t first_row) const {
        if (!x.data) return {nullptr, 0, element};
        const int size = element == Element::float64 ? 8 : element == Element::float32 ? 4 : 2;
        const int64_t start =
            batch * x.batch_stride + head * x.head_stride + first_row * x.row_stride;
        return {static_cast<char*>(x.data) + start * size, x.row_stride, element};
    }
};

}  // namespace jvp_attn::cpu::JVP_ATTN_ISA
