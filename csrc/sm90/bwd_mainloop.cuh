// What a warpgroup does with a tile of queries in the kernels of dK and dV, through the output
// alone, but for the products with dS.
//
// All is transposed: rows are keys, columns queries, so that P and dS are left factors in
// registers. While the exponentials of P are computed, the tensor cores multiply V and dO.
#pragma once

#include "common/softmax.cuh"
#include "sm90/bwd_pipeline.cuh"

namespace jvp_attn::sm90 {

template <class Element, int HeadDim, int Rows, int Keys, int RowStep>
struct BwdMainloop : BwdPipeline<HeadDim, Rows, Keys, RowStep> {
    using S = BwdPipeline<HeadDim, Rows, Keys, RowStep>;
    using typename S::Block, typename S::KeyTile, typename S::Memory, typename S::RowTile;
    using Scores = Accumulator<Rows>;
    using Weights = Packed<Element, Rows>;
    using Gradient = Accumulator<HeadDim>;

    // The 64 keys of a warpgroup, and where it is in the rings.
    struct Warpgroup {
        const AttentionParams& p;
        const Memory& memory;
        int key_phase = 0;
        Position<S::kStages> at = {};

        DEVICE static int row() { return (warpgroup_index() - 1) * 64; }  // within the block

        DEVICE KeyTile k() const { return {memory.keys.slot({0, 0})}; }
        DEVICE RowTile q() const { return {memory.queries.slot({2 * at.slot, 0})}; }

        // Calls for each tile of queries with the gradients to add to, the block, the head and the
        // first query, and stores the gradients.
        template <class Add>
        DEVICE void differentiate(int work_tile, const Add& add) {
            const Block block(p, work_tile);
            if (block.is_empty()) return;
            Gradient grad_k, grad_v;
            if (block.sees_queries()) {
                memory.keys.wait_full({0, key_phase});
                memory.keys.wait_full({1, key_phase});
                block.template for_each_tile<Rows, RowStep>(
                    [&](int head, int first_row) { add(grad_k, grad_v, block, head, first_row); });
                release(memory.keys, Position<2>{0, key_phase});
                release(memory.keys, Position<2>{1, key_phase});
                key_phase ^= 1;
            }
            const Block again(p, opaque(work_tile));
            grad_k.scale(p.softmax_scale);
            again.template store<Element>(p.grad_k, p.head_dim, first_key(again), grad_k);
            again.template store<Element>(p.grad_v, p.head_dim_v, first_key(again), grad_v);
        }

        // dS of the next tile of queries, rounded. The product of the weights and dO, added to
        // grad_v, is still under way.
        DEVICE void find_sbar(Weights& ds, Weights& rounded, Gradient& grad_v, const Block& block,
                              int first_row) const {
            const KeyTile v{memory.keys.slot({1, 0})};
            const RowTile go{memory.queries.slot({2 * at.slot + 1, 0})};
            memory.queries.wait_full({2 * at.slot, at.phase});
            memory.queries.wait_full({2 * at.slot + 1, at.phase});
            memory.statistics.wait_full(at);

            Scores weights, x;
            warpgroup_fence_operand(weights.value);
            warpgroup_fence_operand(x.value);
            wgmma_fence();
            multiply_transposed<Element>(weights, k(), row(), q(), false);
            wgmma_commit();
            multiply_transposed<Element>(x, v, row(), go, false);
            wgmma_commit();
            wgmma_wait<1>();
            warpgroup_fence_operand(weights.value);
            exponentiate(weights, block, first_row);
            round_weights(rounded, weights);

            warpgroup_fence_operand(rounded.word);
            warpgroup_fence_operand(grad_v.value);
            wgmma_fence();
            multiply<Element>(grad_v, rounded, go);
            wgmma_commit();
            wgmma_wait<1>();
            warpgroup_fence_operand(x.value);
#pragma unroll
            for (int i = 0; i < x.kBlocks; ++i) {
                const Numbers known = statistics(i);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    ds.set(i, half,
                           product(weights.at(i, half, 0), x.at(i, half, 0) - known.value[0][2]),
                           product(weights.at(i, half, 1), x.at(i, half, 1) - known.value[0][3]));
                }
            }
        }

        // The tile of queries is needed no more.
        DEVICE void leave_tile() {
            release(memory.queries, Position<2 * S::kStages>{2 * at.slot, at.phase});
            release(memory.queries, Position<2 * S::kStages>{2 * at.slot + 1, at.phase});
            warp_barrier();
            if (lane_index() == 0) memory.statistics.release(at);
            at.advance();
        }

    private:
        // Of the warp, within its sequence.
        DEVICE static int first_key(const Block& block) {
            return block.first_key + row() + opaque(warp_index()) % 4 * 16;
        }

        // One thread speaks for the warpgroup: products are done for all of it at once.
        template <class Ring, class Position>
        DEVICE static void release(const Ring& ring, const Position& place) {
            if (thread_index() % kWarpgroupThreads == 0) ring.release(place);
        }

        // Of a hidden key x may be infinite, and 0 · inf is NaN.
        DEVICE static float product(float weight, float x) { return weight == 0 ? 0 : weight * x; }

        // Of the two queries of a thread among 8: lse in units of log2, and delta.
        DEVICE Numbers statistics(int i) const {
            return load_numbers(memory.statistics.slot(at) + (4 * i + lane_index() % 4) * 16);
        }

        // Scores become weights; those of hidden keys are 0.
        DEVICE void exponentiate(Scores& scores, const Block& block, int first_row) const {
            const float scale = p.softmax_scale * kLog2E;
#pragma unroll
            for (int i = 0; i < scores.kBlocks; ++i) {
                const Numbers known = statistics(i);
#pragma unroll
                for (int half = 0; half < 2; ++half)
#pragma unroll
                    for (int side = 0; side < 2; ++side) {
                        float& score = scores.at(i, half, side);
                        score = score * scale - known.value[0][side];
                    }
            }
            if (block.hides_keys(first_row)) block.hide(scores, first_key(block), first_row);
#pragma unroll
            for (int i = 0; i < scores.kBlocks; ++i)
#pragma unroll
                for (int e = 0; e < 4; ++e) scores.value[i][e] = fast_exp2(scores.value[i][e]);
        }
    };
};

}  // namespace jvp_attn::sm90
