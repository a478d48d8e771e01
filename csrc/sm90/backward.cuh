// Backward without tangents in one pass: dQ, dK and dV.
//
//     S = s Q Kᵀ      P = exp(S − lse)      dS = P∘(dO Vᵀ − delta)
//     dV = Pᵀ dO      dK = s dSᵀ Q          dQ = s dS K
//
// Tiles: K and V are Keys x HeadDim, Q and dO are Rows x HeadDim; a warpgroup computes dK and dV of
// 64 keys. dS of the whole tile, Keys x Rows, goes through shared memory: each warpgroup then
// multiplies it by 64 columns of K and adds the product to dq_accum. Several blocks add to the same
// place atomically, so the order is nondeterministic. sm80/bwd_postprocess.cuh turns dq_accum into
// dQ.
#pragma once

#include "common/dq_accum.cuh"
#include "sm90/bwd_mainloop.cuh"
#include "sm90/epilogue.cuh"

namespace jvp_attn::sm90 {

template <class Element, int HeadDim, int Rows, int Keys>
struct Backward : BwdMainloop<Element, HeadDim, Rows, Keys, Rows> {
    using Mainloop = BwdMainloop<Element, HeadDim, Rows, Keys, Rows>;
    using typename Mainloop::Block, typename Mainloop::Gradient, typename Mainloop::KeyTile;
    using typename Mainloop::Weights;
    using ScoreTile = Tile<Keys, Rows>;
    using Ones = Tile<Keys, 64>;
    static_assert(Rows == 64 && KeyTile::kPanels == Mainloop::kWarpgroups,
                  "a warpgroup computes 64 rows and 64 columns of dQ");

    // 64 columns of dQ, and 8 equal columns: the row sums of dS.
    using GradQ = Accumulator<72>;

    // Two tiles of dS: one warpgroup may store the next tile while another still reads this one.
    static constexpr int kScoreTiles = 2;
    static constexpr int kFirstScores =
        (Mainloop::kPipelineBytes + kSwizzleBytes - 1) / kSwizzleBytes * kSwizzleBytes;
    // Behind the keys in memory, so that one descriptor reaches both.
    static constexpr int kOnes = kFirstScores + kScoreTiles * ScoreTile::kBytes;
    static constexpr int kSharedBytes = kOnes + Ones::kBytes;
    static_assert(kSharedBytes <= kMaxSharedBytes);

    static std::string why_not(const AttentionParams& p) {
        if (std::string error = Mainloop::why_not(p); !error.empty()) return error;
        return why_no_dq_accum(p);
    }

    DEVICE static void run(const Params& params) {
        const Ones ones{shared_memory() + kOnes};
        const uint32_t two_ones = pack<Element>(1, 1);
        for (int i = thread_index(); i < Ones::kBytes / 16; i += Mainloop::kThreads)
            shared_store_words4(ones.base + 16 * i, {two_ones, two_ones, two_ones, two_ones});
        fence_proxy_async();
        const typename Mainloop::Memory memory;
        Mainloop::run(params, memory,
                      Warpgroup{{params.attention, memory}, shared_memory() + kFirstScores, ones});
    }

private:
    struct Warpgroup : Mainloop::Warpgroup {
        SharedAddress scores;
        Ones ones;
        int score_tile = 0;

        DEVICE void operator()(int work_tile) {
            this->differentiate(work_tile, [&](Gradient& grad_k, Gradient& grad_v,
                                               const Block& block, int head, int first_row) {
                // P and dS; issue dV += Pᵀ dO
                Weights ds, rounded;
                this->compute_ds(ds, rounded, grad_v, block, first_row);
                // store dS of this warpgroup's keys, wait for that of the others
                const ScoreTile all = exchange_ds(ds);

                // issue dQ = dS K of this warpgroup's columns, then dK += dSᵀ Q
                GradQ grad_q;
                const auto issue = [&] {
                    multiply_left_transposed<Element>(grad_q, all, this->k().panel(column_part()),
                                                      ones);
                    wgmma_commit();
                    multiply<Element>(grad_k, ds, this->q());
                };
                wgmma_group(issue, grad_q, ds, grad_k);
                // wait for dQ; add it to dq_accum
                wgmma_wait_for<1>(grad_q);
                add(grad_q, DqAccum(this->p, block.sequence, head), first_row + warp_row());
                // wait for dV and dK
                this->leave_tile(grad_k, grad_v, rounded, ds);
            });
        }

    private:
        // The columns 64 column_part to 64 column_part + 63 of dQ are the warpgroup's.
        DEVICE static int column_part() { return warpgroup_index() - 1; }

        // The first row of the warp, within its warpgroup.
        DEVICE static int warp_row() { return opaque(warp_index()) % 4 * 16; }

        DEVICE ScoreTile exchange_ds(const Weights& ds) {
            const ScoreTile all{scores + score_tile * ScoreTile::kBytes};
            score_tile ^= 1;
            const StagingRows<Keys, Rows> own_keys{all, this->row() + warp_row()};
            own_keys.template store<Element>(ds);
            fence_proxy_async();
            named_barrier_sync(1, Mainloop::kConsumerThreads);
            return all;
        }

        // Adds the 16 rows of a warp from `row` on.
        DEVICE static void add(const GradQ& grad_q, const DqAccum& accum, int row) {
            const int first_block = 8 * column_part();
            float* const target = accum.block(row, first_block);
#pragma unroll
            for (int i = 0; i < 8; ++i)
                if (i < accum.column_blocks - first_block)
                    global_add4(target + i * accum.kBlockFloats, grad_q.value[i]);
            if (column_part() != 0 || lane_index() % 4 != 0) return;
#pragma unroll
            for (int half = 0; half < 2; ++half)
                global_add(accum.row_sum(row + row_in_warp(half)), grad_q.at(8, half, 0));
        }
    };
};

}  // namespace jvp_attn::sm90
