// How the forward divides its work among threads. A work tile is a block of rows of one head with
// all keys that it sees or, where there are few rows and many keys, with one of several splits of
// the keys (as in Flash-Decoding). The thread that completes the last split of a block merges them.
#pragma once

#include <algorithm>
#include <atomic>
#include <vector>

#include "cpu/aligned_buffer.h"
#include "cpu/pack.h"
#include "cpu/softmax.h"
#include "cpu/tiles.h"

namespace jvp_attn::cpu::JVP_ATTN_ISA {

template <class Value>
struct ForwardTasks {
    // The rows of a block after one split of the keys.
    struct Split {
        Split(int64_t size, int64_t tsize) : out(size), tout(tsize) {}

        OnlineSoftmax<Value> softmax[kForwardRows];
        AlignedBuffer<Value> out, tout;  // (rows, head_dim_v)
    };

    ForwardTasks(const AttentionParams& params, int threads)
        : p(params),
          splits(count_splits()),
          tiles(splits > 1 ? 1 : count_tiles(threads)),
          blocks(row_blocks(p, tiles * kForwardRows)) {
        if (splits == 1) return;
        const int size = kForwardRows * packed_width<Value>(p.head_dim_v);
        for (int64_t i = 0; i < count(); ++i)
            split_results.emplace_back(size, p.tout.data ? size : 0);
        unfinished = std::vector<std::atomic<int>>(blocks.size());
        for (auto& n : unfinished) n = splits;
    }

    int64_t count() const { return static_cast<int64_t>(blocks.size()) * splits; }

    const AttentionParams& p;
    const int splits;  // of the keys of each block
    const int tiles;   // of kForwardRows rows, per block
    const std::vector<RowBlock> blocks;
    std::vector<Split> split_results;          // (blocks, splits); empty if splits is 1
    std::vector<std::atomic<int>> unfinished;  // splits of each block

private:
    int64_t row_tiles() const {
        int64_t n = 0;
        for (int i = 0; i < p.batch; ++i)
            n += p.heads * ceil_div(SeqlenInfo(p, i).queries, kForwardRows);
        return n;
    }

    // Independent of the number of threads, so that results are as well.
    int count_splits() const {
        constexpr int64_t kEnoughTiles = 32, kMinKeysOfSplit = 8 * kForwardKeys;
        int64_t most = 1;
        for (int i = 0; i < p.batch; ++i)
            most = std::max(most, SeqlenInfo(p, i).keys / kMinKeysOfSplit);
        const int64_t all = std::max<int64_t>(row_tiles(), 1);
        return static_cast<int>(std::clamp<int64_t>(kEnoughTiles / all, 1, most));
    }

    // A block packs its keys and values once for all of its tiles. To balance the load, each thread
    // gets at least kBlocksOfThread blocks if possible. Results do not depend on the tiles.
    int count_tiles(int threads) const {
        constexpr int64_t kMaxTiles = 4, kBlocksOfThread = 4;
        return static_cast<int>(
            std::clamp<int64_t>(row_tiles() / (kBlocksOfThread * threads), 1, kMaxTiles));
    }
};

}  // namespace jvp_attn::cpu::JVP_ATTN_ISA
