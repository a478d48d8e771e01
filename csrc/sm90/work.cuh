// How the pieces of work of a launch are dealt to its blocks.
#pragma once

#include "common/seqlen.cuh"
#include "sm90/params.cuh"

namespace jvp_attn::sm90 {

// The pieces that this block does, one after the other: `for (TileScheduler turn(p); turn;
// turn.next())`. They come in rounds, one work_tile a block; where a block was first in one round
// it is last in the next, so that each has its share of the long ones, which come first.
class TileScheduler {
public:
    DEVICE explicit TileScheduler(const Params& p)
        : blocks_(p.blocks), work_(p.work), place_(block_index()) {}

    DEVICE explicit operator bool() const { return start_ + place_ < work_; }

    DEVICE int work_tile() const { return start_ + place_; }

    DEVICE void next() {
        start_ += blocks_;
        place_ = blocks_ - 1 - place_;
    }

private:
    int blocks_, work_, place_;
    int start_ = 0;  // of the round
};

// Pieces that are blocks of rows: those with the most keys first, of 16 heads at a time. These are
// enough for every block to have a work_tile of the same length, and few enough for the keys of a
// head to be read by several blocks at a time, from the cache.
template <int Rows>
DEVICE RowBlock<Rows> row_block(const AttentionParams& p, int work_tile) {
    constexpr int kHeads = 16;
    const int per_head = RowBlock<Rows>::blocks_of_head(p);
    const int first_head = work_tile / (kHeads * per_head) * kHeads;
    const int heads = min(kHeads, p.batch * p.heads - first_head);
    const int place = work_tile - first_head * per_head;
    return RowBlock<Rows>(p, first_head + place % heads, per_head - 1 - place / heads);
}

}  // namespace jvp_attn::sm90
