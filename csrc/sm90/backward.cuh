// The gradients of Q, K and V, through the output alone: what backward_dkv.cuh computes, and in the
// same pass
//
//     dQ = s dS K
//
// Rounded, dS of a tile of queries goes through shared memory, where every warpgroup finds that
// of all keys of the block. Each then multiplies a part of dQ, and adds it to what other blocks of
// keys have found, in an order that nobody knows. ../sm80/bwd_postprocess.cuh makes dQ of the sums.
#pragma once

#include "common/dq_accum.cuh"
#include "sm90/bwd_mainloop.cuh"
#include "sm90/store.cuh"

namespace jvp_attn::sm90 {

template <class Element, int HeadDim, int Rows, int Keys>
struct Backward : BwdMainloop<Element, HeadDim, Rows, Keys, Rows> {
    using K = BwdMainloop<Element, HeadDim, Rows, Keys, Rows>;
    using typename K::Block, typename K::Gradient, typename K::KeyTile, typename K::Weights;
    using ScoreTile = Tile<Keys, Rows>;
    using Ones = Tile<Keys, 64>;

    // Of dQ a warpgroup has 64 rows and 64 columns, and beside them the sums of the rows of dS.
    using GradQ = Accumulator<72>;
    static constexpr int kRowParts = Rows / 64, kColumnParts = KeyTile::kPanels;
    static_assert(kRowParts * kColumnParts == K::kWarpgroups);

    // While one warpgroup multiplies dS of a tile, another may store that of the next.
    static constexpr int kScoreTiles = 2;
    static constexpr int kFirstScores =
        (K::kStreamBytes + kSwizzleBytes - 1) / kSwizzleBytes * kSwizzleBytes;
    // Behind the keys: products find them from there.
    static constexpr int kOnes = kFirstScores + kScoreTiles * ScoreTile::kBytes;
    static constexpr int kSharedBytes = kOnes + Ones::kBytes;
    static_assert(kSharedBytes <= kMaxSharedBytes);

    static std::string why_not(const AttentionParams& p) {
        if (std::string error = K::why_not(p); !error.empty()) return error;
        return why_no_sums(p);
    }

    DEVICE static void run(const Params& params) {
        const Ones ones{shared_memory() + kOnes};
        const uint32_t two_ones = pack<Element>(1, 1);
        for (int i = thread_index(); i < Ones::kBytes / 16; i += K::kThreads)
            shared_store_words4(ones.base + 16 * i, {two_ones, two_ones, two_ones, two_ones});
        fence_proxy_async();
        const typename K::Memory memory;
        K::run(params, memory,
               Warpgroup{{params.attention, memory}, shared_memory() + kFirstScores, ones});
    }

private:
    struct Warpgroup : K::Warpgroup {
        SharedAddress scores;
        Ones ones;
        int score_tile = 0;

        DEVICE void operator()(int work_tile) {
            this->differentiate(work_tile, [&](Gradient& grad_k, Gradient& grad_v,
                                               const Block& block, int head, int first_row) {
                Weights ds, rounded;
                this->find_sbar(ds, rounded, grad_v, block, first_row);
                const ScoreTile all = share(ds);

                GradQ grad_q;
                warpgroup_fence_operand(grad_q.value);
                warpgroup_fence_operand(ds.word);
                warpgroup_fence_operand(grad_k.value);
                wgmma_fence();
                multiply_left_transposed<Element>(grad_q, all.panel(row_part()),
                                                  this->k().panel(column_part()), ones);
                wgmma_commit();
                multiply<Element>(grad_k, ds, this->q());
                wgmma_commit();
                wgmma_wait<1>();
                warpgroup_fence_operand(grad_q.value);
                add(grad_q, DqAccum(this->p, block.sequence, head),
                    first_row + 64 * row_part() + warp_row());
                wgmma_wait<0>();
                warpgroup_fence_operand(grad_k.value);
                warpgroup_fence_operand(grad_v.value);
                warpgroup_fence_operand(rounded.word);
                warpgroup_fence_operand(ds.word);
                this->leave_tile();
            });
        }

    private:
        // Which part of dQ is the warpgroup's.
        DEVICE static int row_part() { return (warpgroup_index() - 1) % kRowParts; }
        DEVICE static int column_part() { return (warpgroup_index() - 1) / kRowParts; }

        // Of the warp, within its warpgroup.
        DEVICE static int warp_row() { return opaque(warp_index()) % 4 * 16; }

        // Stores dS of the keys of this warpgroup, and waits for that of all others.
        DEVICE ScoreTile share(const Weights& ds) {
            const ScoreTile all{scores + score_tile * ScoreTile::kBytes};
            score_tile ^= 1;
            const Stage<Keys, Rows> stage{all, this->row() + warp_row()};
            stage.template put<Element>(ds);
            fence_proxy_async();
            named_barrier_sync(1, K::kConsumerThreads);
            return all;
        }

        // The rows of a warp from `row` on.
        DEVICE static void add(const GradQ& grad_q, const DqAccum& sums, int row) {
            const int first_block = 8 * column_part();
            float* const place = sums.block(row, first_block);
#pragma unroll
            for (int i = 0; i < 8; ++i)
                if (i < sums.column_blocks - first_block)
                    global_add4(place + i * sums.kBlockFloats, grad_q.value[i]);
            if (column_part() != 0 || lane_index() % 4 != 0) return;
#pragma unroll
            for (int half = 0; half < 2; ++half)
                global_add(sums.total(row + row_in_warp(half)), grad_q.at(8, half, 0));
        }
    };
};

}  // namespace jvp_attn::sm90
