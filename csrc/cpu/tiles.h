// Tile sizes, and the order in which threads process blocks of queries or keys.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/seqlen.h"

namespace jvp_attn::cpu::JVP_ATTN_ISA {

// Tiles of scores, queries x keys. The backward has more keys per tile, since for each tile it
// loads queries and adds to dQ.
constexpr int kForwardRows = 96, kForwardKeys = 128;
constexpr int kBackwardRows = 48, kBackwardKeys = 256;
static_assert(kForwardRows % kMicroRows == 0 && kForwardKeys % kPanel<float> == 0);
static_assert(kBackwardRows % kMicroRows == 0 && kBackwardKeys % kPanel<float> == 0);

constexpr int64_t ceil_div(int64_t a, int b) { return (a + b - 1) / b; }

// Queries of one head.
struct RowBlock {
    int batch, head, first, rows;
};

// All queries in blocks of `rows`, the last of each sequence first: with causal attention these
// have the most keys and take longest.
inline std::vector<RowBlock> row_blocks(const AttentionParams& p, int rows) {
    std::vector<RowBlock> blocks;
    for (int batch = 0; batch < p.batch; ++batch) {
        const int queries = SeqlenInfo(p, batch).queries;
        for (int64_t i = ceil_div(queries, rows) - 1; i >= 0; --i)
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

// All keys in blocks of kBackwardKeys. The blocks of one head are in ascending order, as far apart
// as possible: each waits for the one before it when it adds to dQ.
inline std::vector<KeyBlock> key_blocks(const AttentionParams& p) {
    std::vector<KeyBlock> blocks;
    bool any = true;
    for (int first = 0; any; first += kBackwardKeys) {
        any = false;
        for (int batch = 0; batch < p.batch; ++batch) {
            const int rest = SeqlenInfo(p, batch).keys - first;
            if (rest <= 0) continue;
            any = true;
            for (int head = 0; head < p.heads_k; ++head)
                blocks.push_back({batch, head, first, std::min(kBackwardKeys, rest)});
        }
    }
    return blocks;
}

// Work tiles: blocks of keys for one thread, in the same order. Blocks that add to the same
// elements of the gradients of a mask and its tangent, which have one shape, are in one tile. A
// tile comes where its first block was, so that a block still comes after the one it waits for.
inline std::vector<std::vector<KeyBlock>> key_work_tiles(const AttentionParams& p) {
    const Mask& gradient = p.grad_mask.data ? p.grad_mask : p.grad_tmask;
    std::vector<std::vector<KeyBlock>> tiles;
    std::map<std::array<int, 3>, size_t> tile_at;  // by the elements of the gradient
    for (const KeyBlock& block : key_blocks(p)) {
        size_t tile = tiles.size();
        if (gradient.data) {
            const std::array place = {gradient.batch_stride ? gradient.entry_of(block.batch) : 0,
                                      gradient.head_stride ? block.head : 0,
                                      gradient.column_stride ? block.first : 0};
            tile = tile_at.try_emplace(place, tile).first->second;
        }
        if (tile == tiles.size()) tiles.emplace_back();
        tiles[tile].push_back(block);
    }
    return tiles;
}

}  // namespace jvp_attn::cpu::JVP_ATTN_ISA
