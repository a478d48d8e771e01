// The keys of one head that a block works on at a time, with rows that are keys and columns that
// are queries.
#pragma once

#include "common/seqlen.cuh"
#include "sm90/ptx.cuh"

namespace jvp_attn::sm90 {

template <int Keys>
struct KeyBlock {
    SeqlenInfo sequence;
    int head_k;
    int first_key;
    int first_row;              // of the queries that see any of the keys
    int first_head, last_head;  // of the query heads that share the keys

    // How many there are.
    static int64_t count(const AttentionParams& p) {
        return int64_t{p.batch} * p.heads_k * ((p.seqlen_k + Keys - 1) / Keys);
    }

    // Successive pieces share a head, and so its queries in the cache; of a causal head that with
    // the most queries comes first.
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

    // Calls for each tile of queries, of all heads, with its head and its first row. The first row
    // of all is a multiple of `Step`.
    template <int Rows, int Step = 1, class Function>
    DEVICE void for_each_tile(const Function& function) const {
        if (!sees_queries()) return;
#pragma unroll 1
        for (int head = first_head; head <= last_head; ++head)
#pragma unroll 1
            for (int row = first_row / Step * Step; row < sequence.queries; row += Rows)
                function(head, row);
    }

    // Whether queries from `row` on may not see all keys of the block.
    DEVICE bool hides_keys(int row) const {
        const int end = first_key + Keys;
        return end > sequence.keys || sequence.first_query_of(end - 1) > row;
    }

    // Scores of hidden keys become -inf, for a warp whose first key is `key`.
    template <int Rows>
    DEVICE void hide(Accumulator<Rows>& scores, int key, int row) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int own = key + row_in_warp(half);
            const int first = own < sequence.keys ? sequence.first_query_of(own) : sequence.queries;
            // Compared with what is known at compile time.
            const int hidden = first - row - column_of(0, 0);
#pragma unroll
            for (int i = 0; i < scores.kBlocks; ++i)
#pragma unroll
                for (int side = 0; side < 2; ++side)
                    if (8 * i + side < hidden) scores.at(i, half, side) = -kInfinity;
        }
    }

    // The gradient of the keys of a warp, of which the first is `key`.
    template <class Element, int Columns>
    DEVICE void store(const Tensor& target, int columns, int key,
                      const Accumulator<Columns>& gradient) const {
        if (!target.data) return;
        store_rows<Element>(sequence.key_rows_of(target, head_k, columns), GmemView{}, key,
                            gradient);
    }
};

// Four float32 in shared memory: two statistics of two successive queries each.
using Numbers = Accumulator<8>;

DEVICE Numbers load_numbers(SharedAddress address) {
    Numbers numbers;
    numbers.set_words(0, shared_load_words4(address));
    return numbers;
}

// The statistics x and y of the queries `row` and `row` + 1; beyond the last query they are those
// of one that sees no key. lse is stored as its weights need it.
DEVICE void store_numbers(SharedAddress address, const SeqlenInfo& sequence, int head, int row,
                          const RowVector& x, const RowVector& y, bool x_is_lse) {
    Numbers numbers;
#pragma unroll
    for (int side = 0; side < 2; ++side) {
        const bool exists = row + side < sequence.queries;
        const auto value = [&](const RowVector& statistic, float beyond) {
            return exists ? global_load(sequence.rows_of(statistic, head) + row + side) : beyond;
        };
        numbers.value[0][side] = x_is_lse ? log2_of_sum(value(x, -kInfinity)) : value(x, 0);
        numbers.value[0][2 + side] = value(y, 0);
    }
    shared_store_words4(address, numbers.words(0));
}

}  // namespace jvp_attn::sm90
