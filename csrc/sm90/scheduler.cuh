// The persistent tile scheduler: which work tiles each block of the grid computes, in which order.
#pragma once

#include "common/block.cuh"
#include "sm90/params.cuh"

namespace jvp_attn::sm90 {

// Iterates over the work tiles of this block:
//
//     for (TileScheduler scheduler(params); scheduler; scheduler.next()) ... scheduler.work_tile()
//
// Each round gives one work tile to each block. Long tiles come first, so the order of the blocks
// is reversed from round to round: each block gets its share of the long ones.
class TileScheduler {
public:
    DEVICE explicit TileScheduler(const Params& p)
        : blocks_(p.blocks), work_tiles_(p.work_tiles), place_(block_index()) {}

    DEVICE explicit operator bool() const { return start_ + place_ < work_tiles_; }

    DEVICE int work_tile() const { return start_ + place_; }

    DEVICE void next() {
        start_ += blocks_;
        place_ = blocks_ - 1 - place_;
    }

private:
    int blocks_, work_tiles_, place_;
    int start_ = 0;  // of the round
};

// The rows of a work tile, if work tiles are blocks of rows. Within each group of 16 heads the
// blocks with the most keys come first. 16 heads are enough to give all blocks of the grid work
// tiles of the same length, and few enough that several blocks read the keys of one head from the
// cache at the same time.
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
