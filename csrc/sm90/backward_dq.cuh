// The gradient of Q; with kJvp, through the output's tangent as well, and that of tQ: the
// equations of ../sm80/backward_dq.cuh.
//
// A block has some rows of one head, and each of its warpgroups 64 of them; tiles of K, tK, V and
// tV stream by in a ring, the last first. Three matrices of scores are in registers at a time, next
// to the gradients: P, Tc, and one that is Bc, then Bc∘Tc − delta, and X once the products with V
// and tV are added to it. What a thread knows of its rows waits in shared memory meanwhile.
#pragma once

#include "sm90/backward_rows.cuh"
#include "sm90/limits.h"
#include "sm90/loader.cuh"
#include "sm90/ring.cuh"
#include "sm90/weights.cuh"
#include "sm90/work.cuh"

namespace jvp_attn::sm90 {

template <class Element, int HeadDim, int Rows, int Keys, bool kJvp>
struct BackwardDq {
    using RowTile = Tile<Rows, HeadDim>;
    using KeyTile = Tile<Keys, HeadDim>;
    using Scores = Accumulator<Keys>;
    using Weights = Packed<Element, Keys>;
    using Gradient = Accumulator<HeadDim>;

    static constexpr int kConsumerThreads = Rows / 64 * kWarpgroupThreads;
    static constexpr int kThreads = kWarpgroupThreads + kConsumerThreads;
    static constexpr int kRowBox = Rows, kKeyBox = Keys;

    // In slots of one tile: Q, dO, tQ, dtO; and K, tK, V, tV, as many slots as there is memory for.
    static constexpr int kRowTiles = kJvp ? 4 : 2;
    using RowRing = Ring<kRowTiles, RowTile::kBytes>;
    static constexpr int kOwnBytes = 4 * 16 * kConsumerThreads;  // 4 numbers for each of `SmemSlot`
    static constexpr int kBarrierBytes = 512;
    static constexpr int kSlots =
        (kMaxSharedBytes - RowRing::kBytes - kOwnBytes - kBarrierBytes) / KeyTile::kBytes;
    using KeyRing = Ring<kSlots, KeyTile::kBytes>;
    static constexpr int kSharedBytes = RowRing::kBytes + KeyRing::kBytes + kOwnBytes +
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
            for (TileScheduler turn(params); turn; turn.next())
                warpgroup.differentiate(turn.work_tile());
        }
    }

private:
    // What is where in shared memory.
    struct Memory {
        RowRing rows;
        KeyRing keys;
        SharedAddress own;
        SharedAddress tail_barrier;  // an mbarrier

        DEVICE Memory() {
            rows.slots = shared_memory();
            keys.slots = rows.slots + RowRing::kBytes;
            own = keys.slots + KeyRing::kBytes;
            rows.barriers = own + kOwnBytes;
            keys.barriers = rows.barriers + RowRing::kBarrierBytes;
            tail_barrier = keys.barriers + KeyRing::kBarrierBytes;
        }

        DEVICE void init() const {
            rows.init(1, kConsumerThreads / kWarpgroupThreads);
            keys.init(1, kConsumerThreads / kWarpgroupThreads);
            mbarrier_init(tail_barrier, 1);
            fence_mbarrier_init();
        }
    };

    // The first key of the last tile that any row of a block sees.
    DEVICE static int last_tile(const RowBlock<Rows>& block) {
        return (ceil_div(block.key_end(), Keys) - 1) * Keys;
    }

    DEVICE static void load(const Params& params, Loader<RowTile, kRowTiles> rows,
                            Loader<KeyTile, kSlots> keys) {
        const AttentionParams& p = params.attention;
        const TensorMaps& maps = params.maps;
#pragma unroll 1
        for (TileScheduler turn(params); turn; turn.next()) {
            const auto block = row_block<Rows>(p, turn.work_tile());
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

    // Numbers of a thread's two rows.
    struct Numbers {
        float first[2], second[2];
    };

    // What a thread keeps in shared memory for itself: log2_sum and mu; beta and delta; what the
    // rows of dS and of dT sum to, before and after rounding.
    enum class SmemSlot { weights = 0, cotangents = 1, ds_totals = 2, dt_totals = 3 };

    // What a warpgroup does with its rows of a block of rows.
    struct Warpgroup {
        using Place = Position<kSlots>;

        const AttentionParams& p;
        const Memory& memory;
        int row_phase = 0;
        Place at = {};

        DEVICE void differentiate(int work_tile) {
            const auto block = row_block<Rows>(p, work_tile);
            if (block.is_empty()) return;
            remember_rows(block);

            Gradient grad_q, grad_tq;
            const int last = last_tile(block);
            if (last >= 0) {
                for (int i = 0; i < kRowTiles; ++i) memory.rows.wait_full({i, row_phase});
                const CausalMask horizon{block.sequence, block.first_row + warp_row()};
                const int clear = block.unmasked_key_end();
                Place k, tk;
                int first_key = last;
#pragma unroll 1
                while (true) {
                    k = next();
                    if (kJvp) tk = next();
                    add(grad_q, grad_tq, k, tk, horizon, first_key, clear);
                    if (first_key == 0) break;
                    first_key -= Keys;
                    release(memory.keys, k);
                    if (kJvp) release(memory.keys, tk);
                }
                correct_row_sum_bias(grad_q, grad_tq, tile(k), tile(tk),
                                     row_block<Rows>(p, opaque(work_tile)));
                release(memory.keys, k);
                if (kJvp) release(memory.keys, tk);
                for (int i = 0; i < kRowTiles; ++i)
                    release(memory.rows, Position<kRowTiles>{i, row_phase});
                row_phase ^= 1;
            }
            finish(row_block<Rows>(p, opaque(work_tile)), grad_q, grad_tq);
        }

    private:
        DEVICE static int row() { return (warpgroup_index() - 1) * 64; }  // within the block

        DEVICE static int warp_row() { return row() + opaque(warp_index()) % 4 * 16; }

        DEVICE RowTile row_tile(int which) const { return {memory.rows.slot({which, 0})}; }

        DEVICE KeyTile tile(const Place& place) const { return {memory.keys.slot(place)}; }

        // The place of the next tile of the ring, which is full.
        DEVICE Place next() {
            const Place place = at;
            memory.keys.wait_full(place);
            at.advance();
            return place;
        }

        // One thread speaks for the warpgroup: products are done for all of it at once.
        template <class Ring, class Position>
        DEVICE static void release(const Ring& ring, const Position& place) {
            if (thread_index() % kWarpgroupThreads == 0) ring.release(place);
        }

        DEVICE SharedAddress place_of(SmemSlot what) const {
            const int thread = thread_index() - kWarpgroupThreads;
            return memory.own + (static_cast<int>(what) * kConsumerThreads + thread) * 16;
        }

        DEVICE void store_smem(SmemSlot what, const Numbers& numbers) const {
            Words4 words;
            memcpy(&words, &numbers, sizeof words);
            shared_store_words4(place_of(what), words);
        }

        DEVICE Numbers load_smem(SmemSlot what) const {
            const Words4 words = shared_load_words4(place_of(what));
            Numbers numbers;
            memcpy(&numbers, &words, sizeof words);
            return numbers;
        }

        DEVICE void remember_rows(const RowBlock<Rows>& block) const {
            const RowStatistics<kJvp> rows(p, block, block.first_row + warp_row());
            store_smem(SmemSlot::weights,
                       {{rows.log2_sum[0], rows.log2_sum[1]}, {rows.mu[0], rows.mu[1]}});
            store_smem(SmemSlot::cotangents,
                       {{rows.beta[0], rows.beta[1]}, {rows.delta[0], rows.delta[1]}});
            store_smem(SmemSlot::ds_totals, {});
            store_smem(SmemSlot::dt_totals, {});
        }

        // Rounds the product of weights and x, and adds up its rows.
        DEVICE void multiply_weights(Weights& product, const Scores& weights, const Scores& x,
                                     SmemSlot totals) const {
            Numbers total = load_smem(totals);
#pragma unroll
            for (int i = 0; i < x.kBlocks; ++i)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float low = weights.at(i, half, 0) * x.at(i, half, 0);
                    const float high = weights.at(i, half, 1) * x.at(i, half, 1);
                    product.set(i, half, low, high);
                    total.first[half] += low + high;
                    total.second[half] += product.low(i, half) + product.high(i, half);
                }
            store_smem(totals, total);
        }

        // Scores become weights; those of hidden keys are 0.
        DEVICE void exponentiate(Scores& scores, const CausalMask& horizon, int first_key,
                                 bool hides_keys) const {
            const Numbers rows = load_smem(SmemSlot::weights);
            const float scale = p.softmax_scale * kLog2E;
#pragma unroll
            for (int i = 0; i < scores.kBlocks; ++i)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    scores.value[i][e] = scores.value[i][e] * scale - rows.first[e / 2];
            if (hides_keys) horizon.apply(scores, first_key, -kInfinity);
#pragma unroll
            for (int i = 0; i < scores.kBlocks; ++i)
#pragma unroll
                for (int e = 0; e < 4; ++e) scores.value[i][e] = fast_exp2(scores.value[i][e]);
        }

        // A tile of keys. V and tV are the next in the ring.
        DEVICE void add(Gradient& grad_q, Gradient& grad_tq, const Place& k, const Place& tk,
                        const CausalMask& horizon, int first_key, int clear) {
            const RowTile q = row_tile(0), go = row_tile(1), tq = row_tile(2), gt = row_tile(3);
            const float scale = p.softmax_scale;

            Scores weights, tangents, x;
            warpgroup_fence_operand(weights.value);
            warpgroup_fence_operand(tangents.value);
            wgmma_fence();
            multiply_transposed<Element>(weights, q, row(), tile(k), false);
            wgmma_commit();
            if (kJvp) {
                multiply_transposed<Element>(tangents, tq, row(), tile(k), false);
                multiply_transposed<Element>(tangents, q, row(), tile(tk), true);
                wgmma_commit();
            }
            wgmma_wait<kJvp ? 1 : 0>();
            warpgroup_fence_operand(weights.value);
            exponentiate(weights, horizon, first_key, first_key + Keys > clear);

            const Place v = next();
            Place tv;
            if (kJvp) tv = next();
            Weights ds, dt;
            if (kJvp) {
                warpgroup_fence_operand(x.value);
                wgmma_fence();
                multiply_transposed<Element>(x, gt, row(), tile(v), false);
                wgmma_commit();
                wgmma_wait<0>();
                warpgroup_fence_operand(tangents.value);
                warpgroup_fence_operand(x.value);
                x.subtract_from_rows(load_smem(SmemSlot::cotangents).first);
                x.silence_unweighted(weights);
                multiply_weights(dt, weights, x, SmemSlot::dt_totals);
                const Numbers rows = load_smem(SmemSlot::weights);
#pragma unroll
                for (int i = 0; i < x.kBlocks; ++i)
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        const float centred = tangents.value[i][e] * scale - rows.second[e / 2];
                        x.value[i][e] = weights.value[i][e] == 0 ? 0 : x.value[i][e] * centred;
                    }
            }
            warpgroup_fence_operand(x.value);
            wgmma_fence();
            multiply_transposed<Element>(x, go, row(), tile(v), kJvp);
            if (kJvp) multiply_transposed<Element>(x, gt, row(), tile(tv), true);
            wgmma_commit();
            if (kJvp) {
                warpgroup_fence_operand(dt.word);
                warpgroup_fence_operand(grad_q.value);
                warpgroup_fence_operand(grad_tq.value);
                wgmma_fence();
                multiply<Element>(grad_tq, dt, tile(k));
                multiply<Element>(grad_q, dt, tile(tk));
                wgmma_commit();
            }
            wgmma_wait<kJvp ? 1 : 0>();
            warpgroup_fence_operand(x.value);
            release(memory.keys, v);
            if (kJvp) release(memory.keys, tv);

            x.subtract_from_rows(load_smem(SmemSlot::cotangents).second);
            x.silence_unweighted(weights);
            multiply_weights(ds, weights, x, SmemSlot::ds_totals);
            warpgroup_fence_operand(ds.word);
            if (!kJvp) warpgroup_fence_operand(grad_q.value);
            wgmma_fence();
            multiply<Element>(grad_q, ds, tile(k));
            wgmma_commit();
            wgmma_wait<0>();
            warpgroup_fence_operand(grad_q.value);
            warpgroup_fence_operand(ds.word);
            if (kJvp) warpgroup_fence_operand(grad_tq.value);
            if (kJvp) warpgroup_fence_operand(dt.word);
        }

        // Along a row dS sums to g_lse and dT to g_mu. Rounded they do not, and the mean of K
        // and tK would leak into the gradients. What is too much is taken back from the keys that
        // the row sees of the first tile: if it sees any, it sees some of those.
        DEVICE void correct_row_sum_bias(Gradient& grad_q, Gradient& grad_tq, const KeyTile& k,
                                         const KeyTile& tk, const RowBlock<Rows>& block) const {
            const int first_row = block.first_row + warp_row();
            const CausalMask horizon{block.sequence, first_row};
            const Numbers ds_totals = load_smem(SmemSlot::ds_totals);
            const Numbers dt_totals = load_smem(SmemSlot::dt_totals);
            Weights ds, dt;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int query = first_row + row_in_warp(half);
                const int visible = min(horizon.end(half), Keys);
                const auto share_of = [&](const Numbers& totals, const RowVector& cotangent) {
                    const float excess =
                        quad_sum(totals.second[half]) - value_of_row(block, cotangent, query);
                    return visible > 0 ? -excess / visible : 0;
                };
                const float ds_share = share_of(ds_totals, p.grad_lse);
                const float dt_share = kJvp ? share_of(dt_totals, p.grad_mu) : 0;
#pragma unroll
                for (int i = 0; i < ds.kBlocks; ++i) {
                    const bool low = column_of(i, 0) < visible, high = column_of(i, 1) < visible;
                    ds.set(i, half, low ? ds_share : 0, high ? ds_share : 0);
                    dt.set(i, half, low ? dt_share : 0, high ? dt_share : 0);
                }
            }
            warpgroup_fence_operand(ds.word);
            warpgroup_fence_operand(dt.word);
            warpgroup_fence_operand(grad_q.value);
            warpgroup_fence_operand(grad_tq.value);
            wgmma_fence();
            multiply<Element>(grad_q, ds, k);
            if (kJvp) multiply<Element>(grad_tq, dt, k);
            if (kJvp) multiply<Element>(grad_q, dt, tk);
            wgmma_commit();
            wgmma_wait<0>();
            warpgroup_fence_operand(grad_q.value);
            warpgroup_fence_operand(grad_tq.value);
            warpgroup_fence_operand(ds.word);
            warpgroup_fence_operand(dt.word);
        }

        DEVICE void finish(const RowBlock<Rows>& block, Gradient& grad_q, Gradient& grad_tq) const {
            const int first_row = block.first_row + warp_row();
            correct_delta(p, block, first_row, p.delta, load_smem(SmemSlot::ds_totals).first,
                          p.grad_lse);
            if (kJvp)
                correct_delta(p, block, first_row, p.beta, load_smem(SmemSlot::dt_totals).first,
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
