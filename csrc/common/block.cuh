// What a block of threads works on at a time: some rows of one head, or some keys of one head.
#pragma once

#include "common/seqlen.cuh"

namespace jvp_attn {

// Rows of one head, which are queries. Successive blocks share a head, so its keys stay in the
// cache; in a causal head the block with the most keys comes first.
template <int Rows>
struct RowBlock {
    int head, head_k;
    SeqlenInfo sequence;
    int first_row;

    // The number of blocks of a launch.
    static int64_t count(const AttentionParams& p) {
        return int64_t{p.batch} * p.heads * ((p.seqlen_q + Rows - 1) / Rows);
    }

    DEVICE explicit RowBlock(const AttentionParams& p)
        : RowBlock(p, block_index() / blocks_of_head(p),
                   blocks_of_head(p) - 1 - block_index() % blocks_of_head(p)) {}

    // head_index counts the heads of all sequences, `block` the blocks within a head.
    DEVICE RowBlock(const AttentionParams& p, int head_index, int block)
        : head(head_index % p.heads),
          head_k(head / (p.heads / p.heads_k)),
          sequence(p, head_index / p.heads),
          first_row(block * Rows) {}

    DEVICE static int blocks_of_head(const AttentionParams& p) {
        return ceil_div(p.seqlen_q, Rows);
    }

    DEVICE bool is_empty() const { return first_row >= sequence.queries; }

    // No row sees a key from key_end on.
    DEVICE int key_end() const {
        return sequence.visible_keys(min(first_row + Rows, sequence.queries) - 1);
    }

    // Every row sees all keys before unmasked_key_end, if there is no mask tensor.
    DEVICE int unmasked_key_end() const { return sequence.visible_keys(first_row); }

    DEVICE GmemView rows_of(const Tensor& x, int columns) const {
        return sequence.queries_of(x, head, columns);
    }

    DEVICE GmemView keys_of(const Tensor& x, int columns) const {
        return sequence.keys_of(x, head_k, columns);
    }

    DEVICE float* statistic(const RowVector& x) const { return sequence.rows_of(x, head); }
};

// Keys of one head of K, with the queries of every head of Q that shares them. Rows of a tile are
// keys, columns are queries. Successive blocks share a head, so its queries stay in the cache; in a
// causal head the block with the most queries comes first.
template <int Keys>
struct KeyBlock {
    SeqlenInfo sequence;
    int head_k;
    int first_key;
    int first_row;              // the first query that sees a key of the block
    int first_head, last_head;  // of the query heads that share the keys

    // The number of blocks of a launch.
    static int64_t count(const AttentionParams& p) {
        return int64_t{p.batch} * p.heads_k * ((p.seqlen_k + Keys - 1) / Keys);
    }

    DEVICE KeyBlock(const AttentionParams& p, int work_tile)
        : sequence(p, work_tile / ceil_div(p.seqlen_k, Keys) / p.heads_k),
          head_k(work_tile / ceil_div(p.seqlen_k, Keys) % p.heads_k),
          first_key(work_tile % ceil_div(p.seqlen_k, Keys) * Keys),
          first_row(sequence.first_query_of(first_key)),
          first_head(head_k * (p.heads / p.heads_k)),
          last_head(first_head + p.heads / p.heads_k - 1) {}

    DEVICE bool is_empty() const { return first_key >= sequence.key_rows; }

    DEVICE bool sees_queries() const {
        return first_key < sequence.keys && first_row < sequence.queries;
    }

    // Calls function(head, first_row) for each tile of queries of all heads. The first tile of a
    // head begins at a multiple of Step.
    template <int Rows, int Step = 1, class Function>
    DEVICE void for_each_tile(const Function& function) const {
        if (!sees_queries()) return;
#pragma unroll 1
        for (int head = first_head; head <= last_head; ++head)
#pragma unroll 1
            for (int row = first_row / Step * Step; row < sequence.queries; row += Rows)
                function(head, row);
    }

    // Whether a query from `row` on may not see all keys of the block.
    DEVICE bool hides_keys(int row) const {
        const int end = first_key + Keys;
        return end > sequence.keys || sequence.first_query_of(end - 1) > row;
    }

    // Sets the scores of hidden keys to -inf, for a warp whose first key is `key` and a tile whose
    // first query is `row`.
    template <int Rows>
    DEVICE void hide(Accumulator<Rows>& scores, int key, int row) const {
        const int lane = opaque(lane_index());  // few tiles need it: computed here, not before
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int own = key + lane / 4 + 8 * half;
            const int first = own < sequence.keys ? sequence.first_query_of(own) : sequence.queries;
            // The loop compares this with compile-time constants.
            const int hidden = first - row - lane % 4 * 2;
#pragma unroll
            for (int i = 0; i < scores.kBlocks; ++i)
#pragma unroll
                for (int side = 0; side < 2; ++side)
                    if (8 * i + side < hidden) scores.at(i, half, side) = -kInfinity;
        }
    }

    // Stores the gradient of a warp's 16 keys, the first of which is `key`.
    template <class Element, int Columns>
    DEVICE void store(const Tensor& target, int columns, int key,
                      const Accumulator<Columns>& gradient) const {
        if (!target.data) return;
        store_rows<Element>(sequence.key_rows_of(target, head_k, columns), GmemView{}, key,
                            gradient);
    }
};

}  // namespace jvp_attn
