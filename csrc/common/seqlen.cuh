// Where a block finds its data, and which keys its queries may see.
#pragma once

#include "common/gmem.cuh"
#include "params.h"

namespace jvp_attn {

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;
constexpr float kInfinity = INFINITY;

DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }

// One sequence: its lengths, and where it starts if sequences are packed.
struct SeqlenInfo {
    int batch;
    int64_t first_query, first_key;
    int queries, keys;
    int key_rows;  // of which the first `keys` are used, the others are padding
    int diagonal;  // query i sees the keys j <= i + diagonal

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

    // How many keys, counted from the first, a query sees; none beyond the last query.
    DEVICE int visible_keys(int query) const {
        return query < queries ? min(max(query + 1 + diagonal, 0), keys) : 0;
    }

    // The first query that sees a key.
    DEVICE int first_query_of(int key) const { return max(key - diagonal, 0); }

    DEVICE GmemView queries_of(const Tensor& x, int head, int columns) const {
        return matrix(x, head, first_query, queries, columns);
    }

    DEVICE GmemView keys_of(const Tensor& x, int head, int columns) const {
        return matrix(x, head, first_key, keys, columns);
    }

    // Padding included.
    DEVICE GmemView key_rows_of(const Tensor& x, int head, int columns) const {
        return matrix(x, head, first_key, key_rows, columns);
    }

    // The statistics of the queries of one head; null where there are none.
    DEVICE float* rows_of(const RowVector& x, int head) const {
        if (!x.data) return nullptr;
        return x.data + batch * x.batch_stride + head * x.head_stride + first_query;
    }

private:
    DEVICE GmemView matrix(const Tensor& x, int head, int64_t first_row, int rows,
                           int columns) const {
        auto* data = static_cast<uint16_t*>(x.data);
        if (data) data += batch * x.batch_stride + head * x.head_stride + first_row * x.row_stride;
        return {data, x.row_stride, rows, columns};
    }
};

// The rows of one head that a block works on. Successive blocks share a head, and so its keys in
// the cache; of a causal head the block with the most keys comes first.
template <int Rows>
struct RowBlock {
    int head, head_k;
    SeqlenInfo sequence;
    int first_row;

    // How many there are.
    static int64_t count(const AttentionParams& p) {
        return int64_t{p.batch} * p.heads * ((p.seqlen_q + Rows - 1) / Rows);
    }

    DEVICE explicit RowBlock(const AttentionParams& p)
        : RowBlock(p, block_index() / blocks_of_head(p),
                   blocks_of_head(p) - 1 - block_index() % blocks_of_head(p)) {}

    // Heads are counted over all sequences, blocks within a head.
    DEVICE RowBlock(const AttentionParams& p, int head_index, int block)
        : head(head_index % p.heads),
          head_k(head / (p.heads / p.heads_k)),
          sequence(p, head_index / p.heads),
          first_row(block * Rows) {}

    DEVICE static int blocks_of_head(const AttentionParams& p) {
        return ceil_div(p.seqlen_q, Rows);
    }

    DEVICE bool is_empty() const { return first_row >= sequence.queries; }

    // Keys from here on are seen by no row ...
    DEVICE int key_end() const {
        return sequence.visible_keys(min(first_row + Rows, sequence.queries) - 1);
    }

    // ... and those before by all, if there is no mask.
    DEVICE int unmasked_key_end() const { return sequence.visible_keys(first_row); }

    DEVICE GmemView rows_of(const Tensor& x, int columns) const {
        return sequence.queries_of(x, head, columns);
    }

    DEVICE GmemView keys_of(const Tensor& x, int columns) const {
        return sequence.keys_of(x, head_k, columns);
    }

    DEVICE float* statistic(const RowVector& x) const { return sequence.rows_of(x, head); }
};

// What a mask adds to a score, in units of log2; -inf hides the key.
template <class Element>
struct MaskOfHead {
    const void* data;
    int64_t row_stride, column_stride;
    MaskKind kind;

    DEVICE MaskOfHead(const Mask& mask, int batch, int head)
        : row_stride(mask.row_stride), column_stride(mask.column_stride), kind(mask.kind) {
        const int size = kind == MaskKind::boolean ? 1 : kind == MaskKind::additive_float32 ? 4 : 2;
        const int64_t start = batch * mask.batch_stride + head * mask.head_stride;
        data = static_cast<const uint8_t*>(mask.data) + start * size;
    }

    DEVICE float bias(int query, int key) const {
        const int64_t place = query * row_stride + key * column_stride;
        if (kind == MaskKind::boolean)
            return global_load(static_cast<const uint8_t*>(data) + place) ? 0.f : -kInfinity;
        if (kind == MaskKind::additive_float32)
            return global_load(static_cast<const float*>(data) + place) * kLog2E;
        return unpack_low<Element>(global_load(static_cast<const uint16_t*>(data) + place)) *
               kLog2E;
    }
};

// lse in units of log2, such that exp2(score - result) is 0 in a row that sees no key.
DEVICE float log2_of_sum(float lse) { return lse == -kInfinity ? kInfinity : lse * kLog2E; }

}  // namespace jvp_attn
