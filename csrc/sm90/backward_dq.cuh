// The gradient of Q; with kFull, through the output's tangent as well, and that of tQ: the
// equations of ../sm80/backward_dq.cuh.
//
// A block has some rows of one head, and each of its warpgroups 64 of them; tiles of K, tK, V and
// tV stream by in a ring, the last first. gO Vᵀ is added to where Bc was before: Bc, Bc∘Tc and X
// share the registers of one accumulator.
#pragma once

#include "backward_rows.cuh"
#include "sm90/loader.cuh"
#include "sm90/ring.cuh"
#include "sm90/weights.cuh"
#include "sm90/work.cuh"

namespace jvp_attn::sm90 {

template <class Element, int HeadDim, int Rows, int Keys, bool kFull>
struct BackwardDq {
    using RowTile = Tile<Rows, HeadDim>;
    using KeyTile = Tile<Keys, HeadDim>;
    using Scores = Accumulator<Keys>;
    using Weights = Packed<Element, Keys>;
    using Gradient = Accumulator<HeadDim>;

    static constexpr int kWarpgroups = Rows / 64;  // that multiply
    static constexpr int kThreads = (1 + kWarpgroups) * kWarpgroupThreads;
    static constexpr int kRowBox = Rows, kKeyBox = Keys;

    using RowRing = Ring<1, (kFull ? 4 : 2) * RowTile::kBytes>;
    // As many slots as there is memory for.
    static constexpr int kBarrierBytes = 512;
    static constexpr int kSlots =
        (kMaxSharedBytes - RowRing::kBytes - kBarrierBytes) / KeyTile::kBytes;
    using KeyRing = Ring<kSlots, KeyTile::kBytes>;
    static constexpr int kSharedBytes =
        RowRing::kBytes + KeyRing::kBytes + RowRing::kBarrierBytes + KeyRing::kBarrierBytes + 8;

    static int64_t work(const AttentionParams& p) { return RowBlock<Rows>::count(p); }

    DEVICE static void run(const Params& params) {
        const Memory memory;
        if (thread_index() == 0) memory.init();
        block_barrier();
        if (warpgroup_index() == 0) {
            release_registers<24>();
            if (warp_index() == 0) load(params, memory);
        } else {
            claim_registers<240>();
            Consumer(params, memory).run();
        }
    }

private:
    // What is where in shared memory.
    struct Memory {
        RowRing rows;
        KeyRing keys;
        SharedAddress landed;  // an mbarrier

        DEVICE Memory() {
            rows.slots = shared_memory();
            keys.slots = rows.slots + RowRing::kBytes;
            rows.barriers = keys.slots + KeyRing::kBytes;
            keys.barriers = rows.barriers + RowRing::kBarrierBytes;
            landed = keys.barriers + KeyRing::kBarrierBytes;
        }

        DEVICE void init() const {
            rows.init(1, 4 * kWarpgroups);
            keys.init(1, 4 * kWarpgroups);
            mbarrier_init(landed, 1);
            fence_mbarrier_init();
        }

        DEVICE RowTile row_tile(int which) const { return {rows.slots + which * RowTile::kBytes}; }
        DEVICE RowTile q() const { return row_tile(0); }
        DEVICE RowTile go() const { return row_tile(1); }
        DEVICE RowTile tq() const { return row_tile(2); }
        DEVICE RowTile gt() const { return row_tile(3); }
    };

    // Which inputs there are, of those whose products are left out where they are absent.
    struct Presence {
        bool tk, tv, go;

        DEVICE explicit Presence(const AttentionParams& p)
            : tk(kFull && p.tk.data),
              tv(kFull && p.tv.data && p.grad_tout.data),
              go(p.grad_out.data) {}
    };

    // The first key of the last tile that any row of a block sees.
    DEVICE static int last_tile(const RowBlock<Rows>& block) {
        return ceil_div(block.seen_by_none(), Keys) * Keys - Keys;
    }

    DEVICE static void load(const Params& params, const Memory& memory) {
        const AttentionParams& p = params.attention;
        const Presence has(p);
        Position<1> row_at;
        Loader<KeyTile, kSlots> keys{memory.keys, memory.landed};
#pragma unroll 1
        for (Turn turn(params); turn; turn.next()) {
            const auto block = row_block<Rows>(p, turn.piece());
            if (block.is_empty() || block.seen_by_none() == 0) continue;
            load_rows(params, memory, block, row_at);
            row_at.advance();

            const auto source = [&](const Tensor& x, const TensorMap& map) {
                return keys_of(params, x, map, block.sequence, block.head_k);
            };
#pragma unroll 1
            for (int key = last_tile(block); key >= 0; key -= Keys) {
                keys.load_and_clear(source(p.k, params.maps.k), key);
                if (has.tk) keys.load_and_clear(source(p.tk, params.maps.tk), key);
                keys.load(source(p.v, params.maps.v), key);
                if (has.tv) keys.load(source(p.tv, params.maps.tv), key);
            }
        }
    }

    DEVICE static void load_rows(const Params& params, const Memory& memory,
                                 const RowBlock<Rows>& block, const Position<1>& at) {
        const AttentionParams& p = params.attention;
        memory.rows.wait_empty(at);
        if (elect_one()) {
            const SharedAddress full = memory.rows.full(at);
            const auto load = [&](const RowTile& tile, const Tensor& x, const TensorMap& map) {
                load_tile(tile, queries_of(params, x, map, block.sequence, block.head),
                          block.first_row, full);
            };
            mbarrier_arrive_expect(full, RowRing::kBytes);
            load(memory.q(), p.q, params.maps.q);
            load(memory.go(), p.grad_out, params.maps.grad_out);
            if (kFull) load(memory.tq(), p.tq, params.maps.tq);
            if (kFull) load(memory.gt(), p.grad_tout, params.maps.grad_tout);
        }
        warp_barrier();
    }

    struct Consumer {
        const Params& params;
        const AttentionParams& p;
        const Memory& memory;
        const Presence has;
        const int row = (warpgroup_index() - 1) * 64;  // of the warpgroup in its block
        const int warp_row = row + warp_index() % 4 * 16;
        Position<1> row_at;
        Position<kSlots> at;

        DEVICE Consumer(const Params& all, const Memory& places)
            : params(all), p(all.attention), memory(places), has(all.attention) {}

        DEVICE void run() {
#pragma unroll 1
            for (Turn turn(params); turn; turn.next()) {
                differentiate(turn.piece());
            }
        }

    private:
        using Place = Position<kSlots>;

        // The place of the next tile, which is full.
        DEVICE Place next() {
            const Place place = at;
            memory.keys.wait_full(place);
            at.advance();
            return place;
        }

        DEVICE KeyTile tile(const Place& place) const { return {memory.keys.slot(place)}; }

        template <class Ring, class At>
        DEVICE static void release(const Ring& ring, const At& place) {
            warp_barrier();
            if (lane_index() == 0) ring.release(place);
        }

        DEVICE void differentiate(int piece) {
            const auto block = row_block<Rows>(p, piece);
            if (block.is_empty()) return;
            const int first_row = block.first_row + warp_row;
            const RowStatistics<kFull> rows(p, block, first_row);
            const Horizon horizon(block.sequence, block.first_row + warp_row);
            const float scale = p.softmax_scale, log2_scale = scale * kLog2E;
            const int clear = block.seen_by_all();
            const RowTile q = memory.q(), go = memory.go(), tq = memory.tq(), gt = memory.gt();

            Gradient grad_q, grad_tq;
            RowTotals sbar_totals, tbar_totals;
            Place k, tk;
            if (block.seen_by_none() > 0) memory.rows.wait_full(row_at);
#pragma unroll 1
            for (int first_key = last_tile(block); first_key >= 0; first_key -= Keys) {
                k = next();
                if (has.tk) tk = next();
                Scores weights, tangents, x;
                pin(weights.value);
                wgmma_fence();
                multiply_transposed<Element>(weights, q, row, tile(k), false);
                wgmma_commit();
                if (kFull) {
                    pin(tangents.value);
                    multiply_transposed<Element>(tangents, tq, row, tile(k), false);
                    if (has.tk) multiply_transposed<Element>(tangents, q, row, tile(tk), true);
                    wgmma_commit();
                }
                wgmma_wait<kFull ? 1 : 0>();
                pin(weights.value);
#pragma unroll
                for (int i = 0; i < weights.kBlocks; ++i)
#pragma unroll
                    for (int e = 0; e < 4; ++e)
                        weights.value[i][e] =
                            weights.value[i][e] * log2_scale - rows.log2_sum[e / 2];
                if (first_key + Keys > clear)
                    horizon.replace_hidden(weights, first_key, -kInfinity);
#pragma unroll
                for (int i = 0; i < weights.kBlocks; ++i)
#pragma unroll
                    for (int e = 0; e < 4; ++e)
                        weights.value[i][e] = fast_exp2(weights.value[i][e]);

                const Place v = next();
                Place tv;
                if (has.tv) tv = next();
                Weights sbar, tbar;
                pin(x.value);
                if (kFull) {
                    wgmma_fence();
                    multiply_transposed<Element>(x, gt, row, tile(v), false);
                    wgmma_commit();
                    wgmma_wait<0>();
                    pin(tangents.value);
                    pin(x.value);
                    x.subtract_from_rows(rows.beta);
                    x.silence_unweighted(weights);
                    tbar_totals.add_product(tbar, weights, x);
#pragma unroll
                    for (int i = 0; i < x.kBlocks; ++i)
#pragma unroll
                        for (int e = 0; e < 4; ++e) {
                            const float centred = tangents.value[i][e] * scale - rows.mu[e / 2];
                            x.value[i][e] = weights.value[i][e] == 0 ? 0 : x.value[i][e] * centred;
                        }
                    pin(x.value);
                }
                wgmma_fence();
                if (!kFull || has.go) multiply_transposed<Element>(x, go, row, tile(v), kFull);
                if (has.tv) multiply_transposed<Element>(x, gt, row, tile(tv), true);
                wgmma_commit();
                if (kFull) {
                    pin(tbar.word);
                    pin(grad_q.value);
                    pin(grad_tq.value);
                    wgmma_fence();
                    multiply<Element>(grad_tq, tbar, tile(k));
                    if (has.tk) multiply<Element>(grad_q, tbar, tile(tk));
                    wgmma_commit();
                }
                wgmma_wait<kFull ? 1 : 0>();
                pin(x.value);
                release(memory.keys, v);
                if (has.tv) release(memory.keys, tv);
                x.subtract_from_rows(rows.delta);
                x.silence_unweighted(weights);
                sbar_totals.add_product(sbar, weights, x);
                pin(sbar.word);
                pin(grad_q.value);
                wgmma_fence();
                multiply<Element>(grad_q, sbar, tile(k));
                wgmma_commit();
                wgmma_wait<0>();
                pin(grad_q.value);
                pin(sbar.word);
                if (kFull) pin(grad_tq.value);
                if (kFull) pin(tbar.word);
                if (first_key == 0) break;
                release(memory.keys, k);
                if (has.tk) release(memory.keys, tk);
            }
            if (block.seen_by_none() > 0) {
                release(memory.keys, k);
                if (has.tk) release(memory.keys, tk);
                release(memory.rows, row_at);
                row_at.advance();
            }
            finish(row_block<Rows>(p, opaque(piece)), rows, sbar_totals, tbar_totals, grad_q,
                   grad_tq);
        }

        DEVICE void finish(const RowBlock<Rows>& block, const RowStatistics<kFull>& rows,
                           const RowTotals& sbar_totals, const RowTotals& tbar_totals,
                           Gradient& grad_q, Gradient& grad_tq) {
            const int first_row =
                block.first_row + (warpgroup_index() - 1) * 64 + opaque(warp_index()) % 4 * 16;
            rows.sharpen(block, first_row, p.delta, rows.delta, sbar_totals, p.grad_lse);
            if (kFull) rows.sharpen(block, first_row, p.beta, rows.beta, tbar_totals, p.grad_mu);
            store(block, first_row, p.grad_q, grad_q);
            if (kFull) store(block, first_row, p.grad_tq, grad_tq);
        }

        DEVICE void store(const RowBlock<Rows>& block, int first_row, const Tensor& target,
                          Gradient& gradient) {
            if (!target.data) return;
            gradient.scale(p.softmax_scale);
            store_rows<Element>(block.rows_of(target, p.head_dim), Matrix{}, first_row, gradient);
        }
    };
};

}  // namespace jvp_attn::sm90
