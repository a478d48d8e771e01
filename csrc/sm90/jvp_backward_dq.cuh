// Backward of the forward JVP: dQ, also through tO, and dtQ. sm80/backward_dq.cuh has the
// equations.
//
//     P = exp(S − lse)      Tc = T − mu      Bc = dtO Vᵀ − beta
//     X = dO Vᵀ + dtO tVᵀ + Bc∘Tc − delta
//     dS = P∘X              dT = P∘Bc
//     dQ = s (dS K + dT tK)                  dtQ = s dT K
//
// Tiles: Q, dO, tQ and dtO are Rows x HeadDim; K, tK, V and tV are Keys x HeadDim; a warpgroup
// computes 64 rows. Three matrices of scores are in registers next to the gradients: P, Tc, and one
// that is Bc first, then Bc∘Tc, and X once the products with V and tV have been added.
#pragma once

#include "sm90/dq_pipeline.cuh"

namespace jvp_attn::sm90 {

template <class Element, int HeadDim, int Rows, int Keys>
struct JvpBackwardDq : DqPipeline<Element, HeadDim, Rows, Keys, true> {
    using Pipeline = DqPipeline<Element, HeadDim, Rows, Keys, true>;
    using typename Pipeline::Consumer, typename Pipeline::KeyTile, typename Pipeline::Memory;
    using typename Pipeline::RowTile, typename Pipeline::Scores, typename Pipeline::Weights;
    using Gradient = Accumulator<HeadDim>;

    DEVICE static void run(const Params& params) {
        Pipeline::template run<Warpgroup>(params, Memory());
    }

private:
    struct Warpgroup : Consumer {
        using Consumer::load_smem, Consumer::next, Consumer::p, Consumer::release, Consumer::row;
        using Consumer::row_tile, Consumer::store_smem, Consumer::tile, Consumer::warp_row;
        using typename Consumer::KeySlot;

        DEVICE void differentiate(int work_tile) {
            const auto block = row_block<Rows>(p, work_tile);
            if (block.is_empty()) return;
            const bool centres = store_row_stats(block);

            Gradient grad_q, grad_tq;
            const int last = Pipeline::last_tile(block);
            if (last >= 0) {
                this->wait_rows();
                const CausalMask causal_mask(block.sequence, block.first_row + warp_row());
                KeySlot k, tk;
                int first_key = last;
#pragma unroll 1
                while (true) {
                    // wait for K and tK
                    k = next();
                    tk = next();
                    add(grad_q, grad_tq, k, tk, causal_mask, first_key, centres, work_tile);
                    if (first_key == 0) break;
                    first_key -= Keys;
                    release(k);
                    release(tk);
                }
                // The first tile of keys is still in shared memory.
                correct_row_sum_bias(grad_q, grad_tq, tile(k), tile(tk),
                                     row_block<Rows>(p, opaque(work_tile)));
                release(k);
                release(tk);
                this->release_rows();
            }
            finish(row_block<Rows>(p, opaque(work_tile)), grad_q, grad_tq);
        }

    private:
        // Returns RowLse::centres.
        DEVICE bool store_row_stats(const RowBlock<Rows>& block) const {
            const RowStatistics<true> rows(p, block, block.first_row + warp_row());
            store_smem(SmemSlot::softmax, {{rows.lse.subtrahend[0], rows.lse.subtrahend[1]},
                                           {rows.mu[0], rows.mu[1]}});
            store_smem(SmemSlot::cotangents,
                       {{rows.beta[0], rows.beta[1]}, {rows.delta[0], rows.delta[1]}});
            store_smem(SmemSlot::ds_sums, {});
            store_smem(SmemSlot::dt_sums, {});
            return rows.lse.centres;
        }

        // Turns x = dtO Vᵀ into Bc∘Tc, which may be infinite or NaN where the weight is 0. One loop
        // for both results: its registers become free one after the other.
        DEVICE void multiply_weights_and_tangents(Weights& dt, Scores& x, const Scores& weights,
                                                  const Scores& tangents) const {
            const float scale = p.softmax_scale;
            const RowPair beta = load_smem(SmemSlot::cotangents);
            const RowPair mu = load_smem(SmemSlot::softmax);
            RowPair sum = load_smem(SmemSlot::dt_sums);
#pragma unroll
            for (int i = 0; i < x.kBlocks; ++i)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    float product[2];
#pragma unroll
                    for (int side = 0; side < 2; ++side) {
                        float& bc = x.at(i, half, side);
                        bc -= beta.first[half];
                        product[side] = masked_product(weights.at(i, half, side), bc);
                        bc *= tangents.at(i, half, side) * scale - mu.second[half];
                    }
                    dt.set(i, half, product[0], product[1]);
                    sum.first[half] += product[0] + product[1];
                    sum.second[half] += dt.low(i, half) + dt.high(i, half);
                }
            store_smem(SmemSlot::dt_sums, sum);
        }

        // dS = P∘X, rounded, and its row sums.
        DEVICE void multiply_weights(Weights& ds, const Scores& weights, const Scores& x) const {
            const RowPair delta = load_smem(SmemSlot::cotangents);
            RowPair sum = load_smem(SmemSlot::ds_sums);
#pragma unroll
            for (int i = 0; i < x.kBlocks; ++i)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    float product[2];
#pragma unroll
                    for (int side = 0; side < 2; ++side)
                        product[side] = masked_product(weights.at(i, half, side),
                                                       x.at(i, half, side) - delta.second[half]);
                    ds.set(i, half, product[0], product[1]);
                    sum.first[half] += product[0] + product[1];
                    sum.second[half] += ds.low(i, half) + ds.high(i, half);
                }
            store_smem(SmemSlot::ds_sums, sum);
        }

        // Turns scores into weights; those of hidden keys are 0.
        DEVICE void exponentiate(Scores& scores, const CausalMask& causal_mask, int first_key,
                                 bool centres, int work_tile) const {
            const RowPair rows = load_smem(SmemSlot::softmax);
            subtract_lse(scores, p.softmax_scale, rows.first, centres, [&](int half) {
                const auto block = row_block<Rows>(p, opaque(work_tile));
                return load_lse_lo(p, block, block.first_row + warp_row() + row_in_warp(half));
            });
            if (causal_mask.hides_keys_before(first_key + Keys))
                causal_mask.apply(scores, first_key, -kInfinity);
            scores.exp2();
        }

        // Adds a tile of keys to dQ and dtQ. V and tV are the next tiles of the ring.
        DEVICE void add(Gradient& grad_q, Gradient& grad_tq, const KeySlot& k, const KeySlot& tk,
                        const CausalMask& causal_mask, int first_key, bool centres, int work_tile) {
            const RowTile q = row_tile(0), dout = row_tile(1);
            const RowTile tq = row_tile(2), dtout = row_tile(3);

            // issue S = Q Kᵀ, then T = tQ Kᵀ + Q tKᵀ
            Scores weights, tangents, x;
            const auto issue_scores = [&] {
                multiply_transposed<Element>(weights, q, row(), tile(k), false);
                wgmma_commit();
                multiply_transposed<Element>(tangents, tq, row(), tile(k), false);
                multiply_transposed<Element>(tangents, q, row(), tile(tk), true);
            };
            wgmma_group(issue_scores, weights, tangents);
            // wait for S; P = exp(S − lse), while wgmma computes T
            wgmma_wait_for<1>(weights);
            exponentiate(weights, causal_mask, first_key, centres, work_tile);

            // wait for V and tV
            const KeySlot v = next(), tv = next();
            // issue dtO Vᵀ
            wgmma_group([&] { multiply_transposed<Element>(x, dtout, row(), tile(v), false); }, x);
            // wait for T and dtO Vᵀ
            wgmma_wait_for<0>(tangents, x);
            // dT = P∘Bc and Bc∘Tc
            Weights ds, dt;
            multiply_weights_and_tangents(dt, x, weights, tangents);
            // issue X = Bc∘Tc + dO Vᵀ + dtO tVᵀ
            const auto issue_x = [&] {
                multiply_transposed<Element>(x, dout, row(), tile(v), true);
                multiply_transposed<Element>(x, dtout, row(), tile(tv), true);
            };
            wgmma_group(issue_x, x);
            // issue dtQ += dT K and dQ += dT tK
            const auto issue_dt = [&] {
                multiply<Element>(grad_tq, dt, tile(k));
                multiply<Element>(grad_q, dt, tile(tk));
            };
            wgmma_group(issue_dt, dt, grad_q, grad_tq);
            // wait for X
            wgmma_wait_for<1>(x);
            release(v);
            release(tv);

            // X − delta and dS = P∘X, while wgmma computes the products with dT
            multiply_weights(ds, weights, x);
            // dQ += dS K
            wgmma_group([&] { multiply<Element>(grad_q, ds, tile(k)); }, ds);
            wgmma_wait_for<0>(grad_q, ds, grad_tq, dt);
        }

        DEVICE void correct_row_sum_bias(Gradient& grad_q, Gradient& grad_tq, const KeyTile& k,
                                         const KeyTile& tk, const RowBlock<Rows>& block) const {
            const int first_row = block.first_row + warp_row();
            Weights ds, dt;
            const auto balance = [&](Weights& x, SmemSlot sums, const RowVector& cotangent) {
                const RowPair own = load_smem(sums);
                const float totals[2] = {quad_sum(own.second[0]), quad_sum(own.second[1])};
                balance_row_sums(x, block, first_row, totals, cotangent);
            };
            balance(ds, SmemSlot::ds_sums, p.grad_lse);
            balance(dt, SmemSlot::dt_sums, p.grad_mu);
            const auto issue = [&] {
                multiply<Element>(grad_q, ds, k);
                multiply<Element>(grad_tq, dt, k);
                multiply<Element>(grad_q, dt, tk);
            };
            wgmma_group(issue, ds, dt, grad_q, grad_tq);
            wgmma_wait_for<0>(grad_q, grad_tq, ds, dt);
        }

        // Stores the corrected delta and beta, dQ and dtQ.
        DEVICE void finish(const RowBlock<Rows>& block, Gradient& grad_q, Gradient& grad_tq) const {
            const int first_row = block.first_row + warp_row();
            correct_delta(p, block, first_row, p.delta, load_smem(SmemSlot::ds_sums).first,
                          p.grad_lse);
            correct_delta(p, block, first_row, p.beta, load_smem(SmemSlot::dt_sums).first,
                          p.grad_mu);
            const auto store = [&](const Tensor& target, Gradient& gradient) {
                gradient.scale(p.softmax_scale);
                store_rows<Element>(block.rows_of(target, p.head_dim), GmemView{}, first_row,
                                    gradient);
            };
            store(p.grad_q, grad_q);
            if (p.grad_tq.data) store(p.grad_tq, grad_tq);
        }
    };
};

}  // namespace jvp_attn::sm90
