// One sequence of the batch: its lengths, its rows in global memory, which keys its queries see.
#pragma once

#include "common/gmem.cuh"
#include "params.h"

namespace jvp_attn {

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;
constexpr float kInfinity = INFINITY;

DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }

// The lengths of a sequence, and where it starts if sequences are packed.
struct SeqlenInfo {
    int batch;
    int64_t first_query, first_key;
    int queries, keys;
    int key_rows;  // keys and padding: the first `keys` rows are used
    int diagonal;  // query i sees key j where j <= i + diagonal

    DEVICE SeqlenInfo(const AttentionParams& p, int batch_index)
        : batch(batch_index), first_query(0), first_key(0), queries(p.seqlen_q), keys(p.seqlen_k) {
        if (p.cu_seqlens_q) {
            first_query = global_load(p.cu_seqlens_q + batch);
            queries = global_load(p.cu_seqlens_q + batch + 1) - static_cast<int>(first_query);
        }
        if (p.cu_seqlens_k) {
            first_key = global_load(p.cu_seqlens_k + batch);
            keys = global_load(p.cu_seqlens_k + batch + 1) - static_cast<int>(first_key);
        }
        key_rows = keys;
        if (p.seqused_k) keys = min(max(global_load(p.seqused_k + batch), 0), keys);
        diagonal = p.causal == Causal::no             ? 1 << 30
                   : p.causal == Causal::bottom_right ? keys - queries
                                                      : 0;
    }

    // A query sees the keys 0 to visible_keys - 1; a row beyond the last query sees none.
    DEVICE int visible_keys(int query) const {
        return query < queries ? min(max(query + 1 + diagonal, 0), keys) : 0;
    }

    // The first query that sees a key.
    DEVICE int first_query_of(int key) const { return max(key - diagonal, 0); }

    DEVICE GmemView queries_of(const Tensor& x, int head, int columns) const {
        return view(x, head, first_query, queries, columns);
    }

    DEVICE GmemView keys_of(const Tensor& x, int head, int columns) const {
        return view(x, head, first_key, keys, columns);
    }

    // Keys and padding.
    DEVICE GmemView key_rows_of(const Tensor& x, int head, int columns) const {
        return view(x, head, first_key, key_rows, columns);
    }

    // The statistics of the queries of one head; null if x is absent.
    DEVICE float* rows_of(const RowVector& x, int head) const {
        if (!x.data) return nullptr;
        return x.data + batch * x.batch_stride + head * x.head_stride + first_query;
    }

private:
    DEVICE GmemView view(const Tensor& x, int head, int64_t first_row, int rows,
                         int columns) const {
        auto* data = static_cast<uint16_t*>(x.data);
        if (data) data += batch * x.batch_stride + head * x.head_stride + first_row * x.row_stride;
        return {data, x.row_stride, rows, columns};
    }
};

// The value that a mask adds to a score; -inf hides the key.
template <class Element>
struct MaskOfHead {
    const void* data;
    int64_t row_stride, column_stride;
    MaskKind kind;

    DEVICE MaskOfHead(const Mask& mask, int batch, int head)
        : row_stride(mask.row_stride), column_stride(mask.column_stride), kind(mask.kind) {
        const int size = kind == MaskKind::boolean ? 1 : kind == MaskKind::additive_float32 ? 4 : 2;
        const int entry = batch / mask.batch_group % mask.batch_size;
        const int64_t start = entry * mask.batch_stride + head * mask.head_stride;
        data = static_cast<const uint8_t*>(mask.data) + start * size;
    }

    DEVICE float bias(int query, int key) const {
        const int64_t offset = query * row_stride + key * column_stride;
        if (kind == MaskKind::boolean)
            return global_load(static_cast<const uint8_t*>(data) + offset) ? 0.f : -kInfinity;
        if (kind == MaskKind::additive_float32)
            return global_load(static_cast<const float*>(data) + offset);
        return unpack_low<Element>(global_load(static_cast<const uint16_t*>(data) + offset));
    }
};

}  // namespace jvp_attn
