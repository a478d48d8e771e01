// Backward without tangents: dQ. sm80/backward_dq.cuh has the equations.
//
//     P = exp(S − lse)      dS = P∘(dO Vᵀ − delta)      dQ = s dS K
//
// Tiles: Q and dO are Rows x HeadDim, K and V are Keys x HeadDim; a warpgroup computes 64 rows. A
// warpgroup issues three products together: the scores and dO Vᵀ of a tile of keys, and dQ of the
// tile before. wgmma computes dQ and dO Vᵀ while the warpgroup computes the exponentials. While it
// computes dS, wgmma works for the other warpgroup; they take turns.
#pragma once

#include "sm90/dq_pipeline.cuh"

namespace jvp_attn::sm90 {

// kSumsByProduct: the row sums of the rounded dS are a product with eight columns of ones, which
// the tensor cores compute as columns of dQ. At head dim 64 the sums in registers, two instructions
// for each score, would take longer than the products.
template <class Element, int HeadDim, int Rows, int Keys, bool kSumsByProduct = HeadDim == 64>
struct BackwardDq
    : DqPipeline<Element, HeadDim, Rows, Keys, false, kSumsByProduct ? Tile<Keys, 64>::kBytes : 0> {
    using Ones = Tile<Keys, 64>;
    using Pipeline =
        DqPipeline<Element, HeadDim, Rows, Keys, false, kSumsByProduct ? Ones::kBytes : 0>;
    using typename Pipeline::Consumer, typename Pipeline::Memory, typename Pipeline::Scores;
    using typename Pipeline::Weights;
    using GradQ = Accumulator<kSumsByProduct ? HeadDim + 8 : HeadDim>;
    static_assert(Pipeline::kSlots >= 5,
                  "K and V of this tile and the next, K of the previous one");

    DEVICE static void run(const Params& params) {
        const Memory memory;
        if (kSumsByProduct) {
            const uint32_t two_ones = pack<Element>(1, 1);
            for (int i = thread_index(); i < Ones::kBytes / 16; i += Pipeline::kThreads)
                shared_store_words4(memory.ones + 16 * i, {two_ones, two_ones, two_ones, two_ones});
            fence_proxy_async();
        }
        Pipeline::template run<Warpgroup>(params, memory);
    }

private:
    struct Warpgroup : Consumer {
        using Consumer::memory, Consumer::p;
        using typename Consumer::KeySlot;
        using Turn = typename Pipeline::Turn;

        DEVICE void differentiate(int work_tile) {
            const auto block = row_block<Rows>(p, work_tile);
            if (block.is_empty()) return;
            const bool centres = store_row_stats(block);

            GradQ grad_q;
            RowPair sums = {};  // the row sums of dS in this thread's columns, exact and rounded
            const int last = Pipeline::last_tile(block);
            if (last >= 0) {
                this->wait_rows();
                // issue S = Q Kᵀ and X = dO Vᵀ of the last keys
                KeySlot k = this->next(), v = this->next(), previous_k = k;
                Scores weights, x;
                Weights ds;
                const auto issue_first = [&] {
                    issue_scores(weights, k);
                    wgmma_commit();
                    issue_x(x, v);
                };
                wgmma_group(issue_first, weights, x, grad_q);
                // wait for S
                wgmma_wait_for<1>(weights);

                const CausalMask causal_mask(block.sequence, block.first_row + this->warp_row());
                int first_key = last;
#pragma unroll 1
                while (true) {
                    // P = exp(S − lse), while wgmma computes X, and dQ of the previous keys
                    exponentiate(weights, causal_mask, first_key, centres);
                    // wait for dQ and X
                    wgmma_wait_for<0>(grad_q, ds, x);
                    this->release(v);
                    if (first_key != last) this->release(previous_k);
                    // dS = P∘(X − delta)
                    x.subtract_from_rows(this->load_smem(SmemSlot::cotangents).second);
                    multiply_weights(ds, weights, x, sums);
                    if (first_key == 0) break;
                    first_key -= Keys;

                    // wait for the next K and V
                    previous_k = k;
                    k = this->next();
                    v = this->next();
                    // issue S = Q Kᵀ of the next keys, dQ += dS K of these, X of the next keys
                    const auto issue = [&] {
                        issue_scores(weights, k);
                        wgmma_commit();
                        issue_grad_q(grad_q, ds, previous_k);
                        wgmma_commit();
                        issue_x(x, v);
                    };
                    if (Pipeline::kTurns) Turn::await();
                    wgmma_group(issue, weights, grad_q, ds, x);
                    if (Pipeline::kTurns) Turn::pass();
                    // wait for S
                    wgmma_wait_for<2>(weights);
                }
                // dQ += dS K of the first keys
                wgmma_group([&] { issue_grad_q(grad_q, ds, k); }, grad_q, ds);
                wgmma_wait_for<0>(grad_q, ds);
                // K of the first keys is still in shared memory.
                correct_row_sum_bias(grad_q, k, sums, row_block<Rows>(p, opaque(work_tile)));
                this->release(k);
                this->release_rows();
            }
            finish(row_block<Rows>(p, opaque(work_tile)), grad_q, sums);
        }

    private:
        DEVICE void issue_scores(Scores& scores, const KeySlot& k) const {
            multiply_transposed<Element>(scores, this->row_tile(0), this->row(), this->tile(k),
                                         false);
        }

        DEVICE void issue_x(Scores& x, const KeySlot& v) const {
            multiply_transposed<Element>(x, this->row_tile(1), this->row(), this->tile(v), false);
        }

        DEVICE void issue_grad_q(GradQ& grad_q, const Weights& ds, const KeySlot& k) const {
            if constexpr (kSumsByProduct)
                multiply<Element>(grad_q, ds, this->tile(k), Ones{memory.ones});
            else
                multiply<Element>(grad_q, ds, this->tile(k));
        }

        // Returns RowLse::centres.
        DEVICE bool store_row_stats(const RowBlock<Rows>& block) const {
            const int first_row = block.first_row + this->warp_row();
            const RowStatistics<false> rows(p, block, first_row);
            RowPair softmax, cotangents = {};
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                softmax.first[half] = rows.lse.subtrahend[half];
                softmax.second[half] = value_of_row(block, p.lse_lo, first_row + row_in_warp(half));
                cotangents.second[half] = rows.delta[half];
            }
            this->store_smem(SmemSlot::softmax, softmax);
            this->store_smem(SmemSlot::cotangents, cotangents);
            return rows.lse.centres;
        }

        // Turns scores into weights; those of hidden keys are 0.
        DEVICE void exponentiate(Scores& scores, const CausalMask& causal_mask, int first_key,
                                 bool centres) const {
            const RowPair rows = this->load_smem(SmemSlot::softmax);
            subtract_lse(scores, p.softmax_scale, rows.first, centres,
                         [&](int half) { return rows.second[half]; });
            scores.exp2();
            // Behind the exponentials: ptxas moves no wgmma_wait that follows past this branch.
            if (causal_mask.hides_keys_before(first_key + Keys))
                causal_mask.apply(scores, first_key, 0);
        }

        // Rounds weights∘x and adds its row sums to `sums`.
        DEVICE static void multiply_weights(Weights& product, const Scores& weights,
                                            const Scores& x, RowPair& sums) {
            const RowPair before = sums;
            const auto multiply = [&](const auto& product_of) {
                sums = before;
#pragma unroll
                for (int i = 0; i < x.kBlocks; ++i)
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const float low = product_of(weights.at(i, half, 0), x.at(i, half, 0));
                        const float high = product_of(weights.at(i, half, 1), x.at(i, half, 1));
                        product.set(i, half, low, high);
                        sums.first[half] += low + high;
                        if (!kSumsByProduct)
                            sums.second[half] += product.low(i, half) + product.high(i, half);
                    }
            };
            multiply([](float weight, float x) { return weight * x; });
            // x of a hidden key may be infinite. 0 · inf is NaN, which the sums show.
            if (warp_any(!(fabsf(sums.first[0]) + fabsf(sums.first[1]) < kInfinity)))
                multiply([](float weight, float x) { return masked_product(weight, x); });
        }

        DEVICE void correct_row_sum_bias(GradQ& grad_q, const KeySlot& k, const RowPair& sums,
                                         const RowBlock<Rows>& block) const {
            float totals[2];
#pragma unroll
            for (int half = 0; half < 2; ++half)
                totals[half] = kSumsByProduct ? grad_q.at(grad_q.kBlocks - 1, half, 0)
                                              : quad_sum(sums.second[half]);
            Weights ds;
            balance_row_sums(ds, block, block.first_row + this->warp_row(), totals, p.grad_lse);
            wgmma_group([&] { issue_grad_q(grad_q, ds, k); }, ds, grad_q);
            wgmma_wait_for<0>(grad_q, ds);
        }

        // Stores the corrected delta and dQ.
        DEVICE void finish(const RowBlock<Rows>& block, const GradQ& sum,
                           const RowPair& sums) const {
            const int first_row = block.first_row + this->warp_row();
            correct_delta(p, block, first_row, p.delta, sums.first, p.grad_lse);
            Accumulator<HeadDim> grad_q;
            memcpy(grad_q.value, sum.value, sizeof grad_q.value);
            grad_q.scale(p.softmax_scale);
            store_rows<Element>(block.rows_of(p.grad_q, p.head_dim), GmemView{}, first_row, grad_q);
        }
    };
};

}  // namespace jvp_attn::sm90
