// The gradients of Q, K and V, through the output alone: what backward_dkv.cuh computes, and in the
// same pass
//
//     gQ = s Sbar K
//
// Rounded, Sbar of a tile of queries goes through shared memory, where every warpgroup finds that
// of all keys of the block. Each then multiplies a part of gQ, and adds it to what other blocks of
// keys have found, in an order that nobody knows. ../sm80/finish_grad_q.cuh makes gQ of the sums.
#pragma once

#include "grad_q_sums.cuh"
#include "sm90/key_gradients.cuh"
#include "sm90/store.cuh"

namespace jvp_attn::sm90 {

template <class Element, int HeadDim, int Rows, int Keys>
struct Backward : KeyGradients<Element, HeadDim, Rows, Keys, Rows> {
    using K = KeyGradients<Element, HeadDim, Rows, Keys, Rows>;
    using typename K::Block, typename K::Gradient, typename K::KeyTile, typename K::Weights;
    using ScoreTile = Tile<Keys, Rows>;
    using Ones = Tile<8, 64>;

    // Of gQ a warpgroup has 64 rows and 64 columns.
    static constexpr int kRowParts = Rows / 64, kColumnParts = KeyTile::kPanels;
    static_assert(kRowParts * kColumnParts == K::kWarpgroups);

    // While one warpgroup multiplies Sbar of a tile, another may store that of the next.
    static constexpr int kScoreTiles = 2;
    static constexpr int kScoreBytes = kScoreTiles * ScoreTile::kBytes;
    static constexpr int kSharedBytes = kScoreBytes + Ones::kBytes + K::kStreamBytes;
    static_assert(kSharedBytes <= kMaxSharedBytes);

    static std::string why_not(const AttentionParams& p) {
        if (std::string error = K::why_not(p); !error.empty()) return error;
        return why_no_sums(p);
    }

    DEVICE static void run(const Params& params) {
        const SharedAddress scores = shared_memory();
        const Ones ones{scores + kScoreBytes};
        if (thread_index() < Ones::kBytes / 16) {
            const uint32_t two = pack<Element>(1, 1);
            shared_store_words4(ones.base + 16 * thread_index(), {two, two, two, two});
            fence_proxy_async();
        }
        const typename K::Memory memory(ones.base + Ones::kBytes);
        K::run(params, memory, Warpgroup{{params.attention, memory}, scores, ones});
    }

private:
    struct Warpgroup : K::Warpgroup {
        SharedAddress scores;
        Ones ones;
        int score_tile = 0;

        DEVICE void operator()(int piece) {
            this->differentiate(piece, [&](Gradient& grad_k, Gradient& grad_v, const Block& block,
                                           int head, int first_row) {
                Weights sbar, rounded;
                this->find_sbar(sbar, rounded, grad_v, block, first_row);
                const ScoreTile all = share(sbar);

                Accumulator<64> grad_q;
                Accumulator<8> totals;
                pin(grad_q.value);
                pin(totals.value);
                pin(sbar.word);
                pin(grad_k.value);
                wgmma_fence();
                multiply_shared(grad_q, totals, all.panel(row_part()));
                wgmma_commit();
                multiply<Element>(grad_k, sbar, this->q());
                wgmma_commit();
                wgmma_wait<1>();
                pin(grad_q.value);
                pin(totals.value);
                add(grad_q, totals, GradQSums(this->p, block.sequence, head),
                    first_row + 64 * row_part() + warp_row());
                wgmma_wait<0>();
                pin(grad_k.value);
                pin(grad_v.value);
                pin(rounded.word);
                pin(sbar.word);
                this->leave_tile();
            });
        }

    private:
        // Which part of gQ is the warpgroup's.
        DEVICE static int row_part() { return (warpgroup_index() - 1) % kRowParts; }
        DEVICE static int column_part() { return (warpgroup_index() - 1) / kRowParts; }

        // Of the warp, within its warpgroup.
        DEVICE static int warp_row() { return opaque(warp_index()) % 4 * 16; }

        // Stores Sbar of the keys of this warpgroup, and waits for that of all others.
        DEVICE ScoreTile share(const Weights& sbar) {
            const ScoreTile all{scores + score_tile * ScoreTile::kBytes};
            score_tile ^= 1;
            const Stage<Keys, Rows> stage{all, this->row() + warp_row()};
            stage.template put<Element>(sbar);
            fence_proxy_async();
            named_barrier_sync(1, K::kConsumerThreads);
            return all;
        }

        // Starts the products of 64 columns of Sbarᵀ with K, and with ones: of the sums over the
        // keys each of the warpgroups that have these columns does a part.
        DEVICE void multiply_shared(Accumulator<64>& grad_q, Accumulator<8>& totals,
                                    const Tile<Keys, 64>& sbar) const {
            multiply_left_transposed<Element>(grad_q, sbar, this->k().panel(column_part()));
            constexpr int kSteps = Keys / 16 / kColumnParts;
#pragma unroll
            for (int step = 0; step < kSteps; ++step)
                wgmma<Element, Major::result, Major::contraction>(
                    totals.value, sbar.rows(column_part() * kSteps + step), ones.columns(0, 0),
                    step > 0);
        }

        // The rows of a warp from `row` on.
        DEVICE static void add(const Accumulator<64>& grad_q, const Accumulator<8>& totals,
                               const GradQSums& sums, int row) {
            const int first_block = 8 * column_part();
            float* const place = sums.block(row, first_block);
#pragma unroll
            for (int i = 0; i < grad_q.kBlocks; ++i)
                if (i < sums.column_blocks - first_block)
                    global_add4(place + i * sums.kBlockFloats, grad_q.value[i]);
            if (lane_index() % 4 != 0) return;
#pragma unroll
            for (int half = 0; half < 2; ++half)
                global_add(sums.total(row + row_in_warp(half)), totals.at(0, half, 0));
        }
    };
};

}  // namespace jvp_attn::sm90
