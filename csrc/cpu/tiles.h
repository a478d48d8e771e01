// How the scores of all heads are cut into tiles of some queries x some keys, and in which order
// threads take them.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/sequence.h"

namespace jvp_attn::cpu::JVP_ATTN_ISA {

// Of the forward, and of the backward, which is the faster the more keys meet a query that is read
// and whose gradient is added to.
constexpr int kRows = 96, kKeys = 128;
constexpr int kBackwardRows = 48, kBackwardKeys = 256;
static_assert(kRows % kRowsAtOnce == 0 && kKeys % kPanel<float> == 0);
static_assert(kBackwardRows % kRowsAtOnce == 0 && kBackwardKeys % kPanel<float> == 0);

constexpr int64_t tiles_of(int64_t length, int tile) { return (length + tile - 1) / tile; }

// Queries of one head.
struct RowBlock {
    int batch, head, first, rows;
};

// All queries, in blocks of so many rows. Later ones of a causal head take longest, and come first.
inline std::vector<RowBlock> row_blocks(const AttentionParams& p, int rows) {
    std::vector<RowBlock> blocks;
    for (int batch = 0; batch < p.batch; ++batch) {
        const int queries = Sequence(p, batch).queries;
        for (int64_t i = tiles_of(queries, rows) - 1; i >= 0; --i)
            for (int head = 0; head < p.heads; ++head) {
                const int first = static_cast<int>(i * rows);
                blocks.push_back({batch, head, first, std::min(rows, queries - first)});
            }
    }
    return blocks;
}

// Keys of one head.
struct KeyBlock {
    int batch, head, first, keys;
};

// All keys, for the backward. Those of one head come in their order, with as many heads as there
// are in between.
inline std::vector<KeyBlock> key_blocks(const AttentionParams& p) {
    std::vector<KeyBlock> blocks;
    bool any = true;
    for (int first = 0; any; first += kBackwardKeys) {
        any = false;
        for (int batch = 0; batch < p.batch; ++batch) {
            const int rest = Sequence(p, batch).keys - first;
            if (rest <= 0) continue;
            any = true;
            for (int head = 0; head < p.heads_k; ++head)
                blocks.push_back({batch, head, first, std::min(kBackwardKeys, rest)});
        }
    }
    return blocks;
}

}  // namespace jvp_attn::cpu::JVP_ATTN_ISA
