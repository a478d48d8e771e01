// Backward: dQ; with kJvp also through tO, and dtQ. sm80/backward_dq.cuh has the equations.
//
//     P = exp(S − lse)      Tc = T − mu      Bc = dtO Vᵀ − beta
//     X = dO Vᵀ + dtO tVᵀ + Bc∘Tc − delta
//     dS = P∘X              dT = P∘Bc
//     dQ = s (dS K + dT tK)                  dtQ = s dT K
//
// Tiles: Q, dO, tQ and dtO are Rows x HeadDim, and stay in shared memory; a warpgroup computes 64
// rows. K, tK, V and tV are Keys x HeadDim and stream through a ring, the last keys first. Three
// matrices of scores are in registers next to the gradients: P, Tc, and one that is Bc first, then
// Bc∘Tc − delta, and X once the products with V and tV have been added. The statistics of the rows
// wait in shared memory.
#pragma once

#include "common/smem.cuh"
#include "sm90/pipeline.cuh"
#include "sm90/scheduler.cuh"
#include "sm90/softmax.cuh"

namespace jvp_attn::sm90 {

template <class Element, int HeadDim, int Rows, int Keys, bool kJvp>
struct BackwardDq {
    using RowTile = Tile<Rows, HeadDim>;
    using KeyTile = Tile<Keys, HeadDim>;
    using Scores = Accumulator<Keys>;
    using Weights = Packed<Element, Keys>;
    using Gradient = Accumulator<HeadDim>;

    // Two values of each of the two rows of a thread.
    struct RowPair {
        float first[2], second[2];
    };

    static constexpr int kConsumerThreads = Rows / 64 * kWarpgroupThreads;
    static constexpr int kThreads = kWarpgroupThreads + kConsumerThreads;
    static constexpr int kRowBox = Rows, kKeyBox = Keys;

    // Each slot holds one tile: Q, dO, tQ and dtO; K, tK, V and tV in as many slots as fit.
    static constexpr int kRowTiles = kJvp ? 4 : 2;
    using RowRing = Ring<kRowTiles, RowTile::kBytes>;
    static constexpr int kSmemSlotBytes = 4 * sizeof(RowPair) * kConsumerThreads;
    static constexpr int kBarrierBytes = 512;
    static constexpr int kSlots =
        (kMaxSharedBytes - RowRing::kBytes - kSmemSlotBytes - kBarrierBytes) / KeyTile::kBytes;
    using KeyRing = Ring<kSlots, KeyTile::kBytes>;
    static constexpr int kSharedBytes = RowRing::kBytes + KeyRing::kBytes + kSmemSlotBytes +
                                        RowRing::kBarrierBytes + KeyRing::kBarrierBytes + 8;

    static std::string why_not(const AttentionParams& p) { return sm90::why_not(p, HeadDim); }
    static int64_t work(const AttentionParams& p) { return RowBlock<Rows>::count(p); }

    DEVICE static void run(const Params& params) {
        const Memory memory;
        if (thread_index() == 0) memory.init();
        block_barrier();
        if (warpgroup_index() == 0) {
            warpgroup_reg_dealloc<24>();
            if (warp_index() == 0)
                load(params, {memory.rows, memory.tail_barrier},
                     {memory.keys, memory.tail_barrier});
        } else {
            warpgroup_reg_alloc<240>();
            Warpgroup warpgroup{params.attention, memory};
#pragma unroll 1
            for (TileScheduler scheduler(params); scheduler; scheduler.next())
                warpgroup.differentiate(scheduler.work_tile());
        }
    }

private:
    // The layout of shared memory.
    struct Memory {
        RowRing rows;
        KeyRing keys;
        SharedAddress smem_slots;
        SharedAddress tail_barrier;

        DEVICE Memory() {
            SmemAllocator smem;
            rows.slots = smem.take(RowRing::kBytes);
            keys.slots = smem.take(KeyRing::kBytes);
            smem_slots = smem.take(kSmemSlotBytes);
            rows.barriers = smem.take(RowRing::kBarrierBytes);
            keys.barriers = smem.take(KeyRing::kBarrierBytes);
            tail_barrier = smem.take(8);
        }

        DEVICE void init() const {
            rows.init(1, kConsumerThreads / kWarpgroupThreads);
            keys.init(1, kConsumerThreads / kWarpgroupThreads);
            mbarrier_init(tail_barrier, 1);
            fence_mbarrier_init();
        }
    };

    // The first key of the last tile that a row of the block sees.
    DEVICE static int last_tile(const RowBlock<Rows>& block) {
        return (ceil_div(block.key_end(), Keys) - 1) * Keys;
    }

    DEVICE static void load(const Params& params, Loader<RowTile, kRowTiles> rows,
                            Loader<KeyTile, kSlots> keys) {
        const AttentionParams& p = params.attention;
        const TensorMaps& maps = params.maps;
#pragma unroll 1
        for (TileScheduler scheduler(params); scheduler; scheduler.next()) {
            const auto block = row_block<Rows>(p, scheduler.work_tile());
            if (block.is_empty() || block.key_end() == 0) continue;
            const auto load_rows = [&](const Tensor& x, const TensorMap& map) {
                rows.load(queries_of(params, x, map, block.sequence, block.head), block.first_row);
            };
            load_rows(p.q, maps.q);
            load_rows(p.grad_out, maps.grad_out);
            if (kJvp) load_rows(p.tq, maps.tq);
            if (kJvp) load_rows(p.grad_tout, maps.grad_tout);

            const auto source = [&](const Tensor& x, const TensorMap& map) {
                return keys_of(params, x, map, block.sequence, block.head_k);
            };
#pragma unroll 1
            for (int key = last_tile(block); key >= 0; key -= Keys) {
                keys.load_and_clear(source(p.k, maps.k), key);
                if (kJvp) keys.load_and_clear(source(p.tk, maps.tk), key);
                keys.load(source(p.v, maps.v), key);
                if (kJvp) keys.load(source(p.tv, maps.tv), key);
            }
        }
    }

    // A thread keeps four RowPairs in shared memory, which saves registers: RowLse::subtrahend and
    // mu; beta and delta; the row sums of dS and of dT in its columns, exact and rounded.
    enum class SmemSlot { softmax = 0, cotangents = 1, ds_sums = 2, dt_sums = 3 };

    // A consumer warpgroup.
    struct Warpgroup {
        using KeySlot = PipelineState<kSlots>;

        const AttentionParams& p;
        const Memory& memory;
        int row_phase = 0;
        KeySlot at = {};

        DEVICE void differentiate(int work_tile) {
            const auto block = row_block<Rows>(p, work_tile);
            if (block.is_empty()) return;
            const bool centres = store_row_stats(block);

            Gradient grad_q, grad_tq;
            const int last = last_tile(block);
            if (last >= 0) {
                // wait for Q, dO, tQ and dtO
                for (int i = 0; i < kRowTiles; ++i) memory.rows.wait_full({i, row_phase});
                const CausalMask causal_mask{block.sequence, block.first_row + warp_row()};
                const int unmasked_key_end = block.unmasked_key_end();
                KeySlot k, tk;
                int first_key = last;
#pragma unroll 1
                while (true) {
                    // wait for K and tK
                    k = next();
                    if (kJvp) tk = next();
                    add(grad_q, grad_tq, k, tk, causal_mask, first_key, unmasked_key_end, centres,
                        work_tile);
                    if (first_key == 0) break;
                    first_key -= Keys;
                    memory.keys.release_by_warpgroup(k);
                    if (kJvp) memory.keys.release_by_warpgroup(tk);
                }
                // The first tile of keys is still in shared memory.
                correct_row_sum_bias(grad_q, grad_tq, tile(k), tile(tk),
                                     row_block<Rows>(p, opaque(work_tile)));
                memory.keys.release_by_warpgroup(k);
                if (kJvp) memory.keys.release_by_warpgroup(tk);
                for (int i = 0; i < kRowTiles; ++i)
                    memory.rows.release_by_warpgroup({i, row_phase});
                row_phase ^= 1;
            }
            finish(row_block<Rows>(p, opaque(work_tile)), grad_q, grad_tq);
        }

    private:
        // The first row of this warpgroup and of this warp, within the block.
        DEVICE static int row() { return (warpgroup_index() - 1) * 64; }
        DEVICE static int warp_row() { return row() + opaque(warp_index()) % 4 * 16; }

        DEVICE RowTile row_tile(int which) const { return {memory.rows.slot({which, 0})}; }

        DEVICE KeyTile tile(const KeySlot& slot) const { return {memory.keys.slot(slot)}; }

        // Waits for the next tile of the ring and returns its slot.
        DEVICE KeySlot next() {
            const KeySlot slot = at;
            memory.keys.wait_full(slot);
            at.advance();
            return slot;
        }

        DEVICE SharedAddress address_of(SmemSlot slot) const {
            const int thread = thread_index() - kWarpgroupThreads;
            return memory.smem_slots + (static_cast<int>(slot) * kConsumerThreads + thread) * 16;
        }

        DEVICE void store_smem(SmemSlot slot, const RowPair& values) const {
            Words4 words;
            memcpy(&words, &values, sizeof words);
            shared_store_words4(address_of(slot), words);
        }

        DEVICE RowPair load_smem(SmemSlot slot) const {
            const Words4 words = shared_load_words4(address_of(slot));
            RowPair values;
            memcpy(&values, &words, sizeof words);
            return values;
        }

        // Returns RowLse::centres.
        DEVICE bool store_row_stats(const RowBlock<Rows>& block) const {
            const RowStatistics<kJvp> rows(p, block, block.first_row + warp_row());
            store_smem(SmemSlot::softmax, {{rows.lse.subtrahend[0], rows.lse.subtrahend[1]},
                                           {rows.mu[0], rows.mu[1]}});
            store_smem(SmemSlot::cotangents,
                       {{rows.beta[0], rows.beta[1]}, {rows.delta[0], rows.delta[1]}});
            store_smem(SmemSlot::ds_sums, {});
            store_smem(SmemSlot::dt_sums, {});
            return rows.lse.centres;
        }

        // Rounds weights∘x and adds its row sums, exact and rounded, to those in shared memory.
        DEVICE void multiply_weights(Weights& product, const Scores& weights, const Scores& x,
                                     SmemSlot row_sums) const {
            RowPair sum = load_smem(row_sums);
#pragma unroll
            for (int i = 0; i < x.kBlocks; ++i)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float low = weights.at(i, half, 0) * x.at(i, half, 0);
                    const float high = weights.at(i, half, 1) * x.at(i, half, 1);
                    product.set(i, half, low, high);
                    sum.first[half] += low + high;
                    sum.second[half] += product.low(i, half) + product.high(i, half);
                }
            store_smem(row_sums, sum);
        }

        // Turns scores into weights; those of hidden keys are 0.
        DEVICE void exponentiate(Scores& scores, const CausalMask& causal_mask, int first_key,
                                 bool hides_keys, bool centres, int work_tile) const {
            const RowPair rows = load_smem(SmemSlot::softmax);
            subtract_lse(scores, p.softmax_scale, rows.first, centres, [&](int half) {
                const auto block = row_block<Rows>(p, opaque(work_tile));
                return load_lse_lo(p, block, block.first_row + warp_row() + row_in_warp(half));
            });
            if (hides_keys) causal_mask.apply(scores, first_key, -kInfinity);
            scores.exp2();
        }

        // Adds a tile of keys to dQ and dtQ. V and tV are the next tiles of the ring.
        DEVICE void add(Gradient& grad_q, Gradient& grad_tq, const KeySlot& k, const KeySlot& tk,
                        const CausalMask& causal_mask, int first_key, int unmasked_key_end,
                        bool centres, int work_tile) {
            const RowTile q = row_tile(0), dout = row_tile(1);
            const RowTile tq = row_tile(2), dtout = row_tile(3);
            const float scale = p.softmax_scale;

            // issue S = Q Kᵀ, then T = tQ Kᵀ + Q tKᵀ
            Scores weights, tangents, x;
            const auto issue_scores = [&] {
                multiply_transposed<Element>(weights, q, row(), tile(k), false);
                if (!kJvp) return;
                wgmma_commit();
                multiply_transposed<Element>(tangents, tq, row(), tile(k), false);
                multiply_transposed<Element>(tangents, q, row(), tile(tk), true);
            };
            wgmma_group(issue_scores, weights, tangents);
            // wait for S; P = exp(S − lse), while wgmma computes T
            wgmma_wait_for<kJvp ? 1 : 0>(weights);
            exponentiate(weights, causal_mask, first_key, first_key + Keys > unmasked_key_end,
                         centres, work_tile);

            // wait for V and tV
            const KeySlot v = next();
            KeySlot tv;
            if (kJvp) tv = next();
            Weights ds, dt;
            if (kJvp) {
                // dtO Vᵀ
                wgmma_group([&] { multiply_transposed<Element>(x, dtout, row(), tile(v), false); },
                            x);
                // wait for T and dtO Vᵀ
                wgmma_wait_for<0>(tangents, x);
                // Bc = dtO Vᵀ − beta and dT = P∘Bc
                x.subtract_from_rows(load_smem(SmemSlot::cotangents).first);
                x.zero_unweighted(weights);
                multiply_weights(dt, weights, x, SmemSlot::dt_sums);
                // Bc∘Tc
                const RowPair rows = load_smem(SmemSlot::softmax);
#pragma unroll
                for (int i = 0; i < x.kBlocks; ++i)
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        const float centred = tangents.value[i][e] * scale - rows.second[e / 2];
                        x.value[i][e] = weights.value[i][e] == 0 ? 0 : x.value[i][e] * centred;
                    }
            }
            // issue X = Bc∘Tc + dO Vᵀ + dtO tVᵀ
            const auto issue_x = [&] {
                multiply_transposed<Element>(x, dout, row(), tile(v), kJvp);
                if (kJvp) multiply_transposed<Element>(x, dtout, row(), tile(tv), true);
            };
            wgmma_group(issue_x, x);
            if (kJvp) {
                // issue dtQ += dT K and dQ += dT tK
                const auto issue_dt = [&] {
                    multiply<Element>(grad_tq, dt, tile(k));
                    multiply<Element>(grad_q, dt, tile(tk));
                };
                wgmma_group(issue_dt, dt, grad_q, grad_tq);
            }
            // wait for X
            wgmma_wait_for<kJvp ? 1 : 0>(x);
            memory.keys.release_by_warpgroup(v);
            if (kJvp) memory.keys.release_by_warpgroup(tv);

            // X − delta and dS = P∘X, while wgmma computes the products with dT
            x.subtract_from_rows(load_smem(SmemSlot::cotangents).second);
            x.zero_unweighted(weights);
            multiply_weights(ds, weights, x, SmemSlot::ds_sums);
            // dQ += dS K
            const auto issue_ds = [&] { multiply<Element>(grad_q, ds, tile(k)); };
            if (kJvp) {
                wgmma_group(issue_ds, ds);
                wgmma_wait_for<0>(grad_q, ds, grad_tq, dt);
            } else {
                wgmma_group(issue_ds, ds, grad_q);
                wgmma_wait_for<0>(grad_q, ds);
            }
        }

        // In exact arithmetic a row of dS sums to dlse and a row of dT to dmu. Rounded rows do not,
        // and the mean of K and tK would leak into the gradients. The excess is subtracted from the
        // keys of the first tile that the row sees; a row that sees any key sees some of these.
        DEVICE void correct_row_sum_bias(Gradient& grad_q, Gradient& grad_tq, const KeyTile& k,
                                         const KeyTile& tk, const RowBlock<Rows>& block) const {
            const int first_row = block.first_row + warp_row();
            const CausalMask causal_mask{block.sequence, first_row};
            const RowPair ds_sums = load_smem(SmemSlot::ds_sums);
            const RowPair dt_sums = load_smem(SmemSlot::dt_sums);
            Weights ds, dt;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int query = first_row + row_in_warp(half);
                const int visible = min(causal_mask.end(half), Keys);
                const auto share_of = [&](const RowPair& sums, const RowVector& cotangent) {
                    const float excess =
                        quad_sum(sums.second[half]) - value_of_row(block, cotangent, query);
                    return visible > 0 ? -excess / visible : 0;
                };
                const float ds_share = share_of(ds_sums, p.grad_lse);
                const float dt_share = kJvp ? share_of(dt_sums, p.grad_mu) : 0;
#pragma unroll
                for (int i = 0; i < ds.kBlocks; ++i) {
                    const bool low = column_of(i, 0) < visible, high = column_of(i, 1) < visible;
                    ds.set(i, half, low ? ds_share : 0, high ? ds_share : 0);
                    dt.set(i, half, low ? dt_share : 0, high ? dt_share : 0);
                }
            }
            const auto issue = [&] {
                multiply<Element>(grad_q, ds, k);
                if (kJvp) multiply<Element>(grad_tq, dt, k);
                if (kJvp) multiply<Element>(grad_q, dt, tk);
            };
            wgmma_group(issue, ds, dt, grad_q, grad_tq);
            wgmma_wait_for<0>(grad_q, grad_tq, ds, dt);
        }

        // Stores the corrected delta and beta, dQ and dtQ.
        DEVICE void finish(const RowBlock<Rows>& block, Gradient& grad_q, Gradient& grad_tq) const {
            const int first_row = block.first_row + warp_row();
            correct_delta(p, block, first_row, p.delta, load_smem(SmemSlot::ds_sums).first,
                          p.grad_lse);
            if (kJvp)
                correct_delta(p, block, first_row, p.beta, load_smem(SmemSlot::dt_sums).first,
                              p.grad_mu);
            const auto store = [&](const Tensor& target, Gradient& gradient) {
                gradient.scale(p.softmax_scale);
                store_rows<Element>(block.rows_of(target, p.head_dim), GmemView{}, first_row,
                                    gradient);
            };
            store(p.grad_q, grad_q);
            if (kJvp && p.grad_tq.data) store(p.grad_tq, grad_tq);
        }
    };
};

}  // namespace jvp_attn::sm90
