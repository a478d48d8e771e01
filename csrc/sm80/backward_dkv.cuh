// Backward: dK and dV; with kJvp also through tO, and dtK and dtV.
//
//     P, Tc, Bc, dS and dT as in backward_dq.cuh
//     dV = Pᵀ dO + (P∘Tc)ᵀ dtO      dtV = Pᵀ dtO
//     dK = s (dSᵀ Q + dTᵀ tQ)       dtK = s dTᵀ Q
//
// Tiles: K, V, tK and tV are Keys x HeadDim and stay in shared memory; Q, dO, tQ and dtO are Rows x
// HeadDim and stream, those of all query heads that share the keys. Everything is transposed: rows
// are keys and columns are queries. The registers of one warp cannot hold all gradients, so two
// warps share 16 keys:
//     the value warp  P and Tc, which it stores in shared memory; dV and dtV
//     the key warp    Bc and dO Vᵀ + dtO tVᵀ − delta, then dS and dT; dK and dtK
#pragma once

#include "common/block.cuh"
#include "common/lse.cuh"
#include "common/smem.cuh"
#include "sm80/tile.cuh"

namespace jvp_attn {

template <class Element, int HeadDim, int Rows, int Keys, bool kJvp, bool kMasked>
struct BackwardDkv {
    using RowTile = Tile<Rows, HeadDim>;
    using KeyTile = Tile<Keys, HeadDim>;
    using Scores = Accumulator<Rows>;
    using Weights = Packed<Element, Rows>;
    using Gradient = Accumulator<HeadDim>;

    static constexpr int kPairs = Keys / 16;  // of a value warp and a key warp
    static constexpr int kThreads = 2 * kPairs * 32;

    static constexpr int kTensors = kJvp ? 4 : 2;
    static constexpr int kScoresBytes = 16 * Rows * 4;
    static constexpr int kExchangeBytes = kPairs * (kJvp ? 2 : 1) * kScoresBytes;
    static constexpr int kStatisticBytes = Rows * 4;
    static constexpr int kSharedBytes = kTensors * (KeyTile::kBytes + RowTile::kBytes) +
                                        kExchangeBytes + (kTensors + 1) * kStatisticBytes;

    static int64_t blocks(const AttentionParams& p) { return KeyBlock<Keys>::count(p); }

    DEVICE static void run(const AttentionParams& p) {
        const Block block(p);
        if (block.first_key >= block.sequence.key_rows) return;
        if (block.is_value_warp())
            stream<ValueWarp>(block);
        else
            stream<KeyWarp>(block);
    }

private:
    // The keys, with what the warps of the block share.
    // KeyBlock has the same members, but with it as a base the compiler needs more instructions.
    struct Block {
        const AttentionParams& p;
        int head_k;
        SeqlenInfo sequence;
        int first_key;
        bool has_tq, has_tk, has_tv, has_dout, has_dtout;

        int first_head, last_head;  // of the query heads that share the keys
        int first_row;              // the first query that sees a key of the block

        KeyTile k_tile, v_tile, tk_tile, tv_tile;
        RowTile q_tile, dout_tile, tq_tile, dtout_tile;
        SharedAddress exchange;
        SharedAddress lse, lse_lo, delta, mu, beta;  // of the queries of the tile

        DEVICE explicit Block(const AttentionParams& params)
            : p(params),
              head_k(block_index() / ceil_div(p.seqlen_k, Keys) % p.heads_k),
              sequence(p, block_index() / ceil_div(p.seqlen_k, Keys) / p.heads_k),
              first_key(block_index() % ceil_div(p.seqlen_k, Keys) * Keys),
              has_tq(kJvp && p.tq.data),
              has_tk(kJvp && p.tk.data),
              has_tv(kJvp && p.tv.data && p.grad_tout.data),
              has_dout(p.grad_out.data),
              has_dtout(kJvp && p.grad_tout.data),
              first_head(head_k * (p.heads / p.heads_k)),
              last_head(first_head + p.heads / p.heads_k - 1),
              first_row(sequence.first_query_of(first_key)) {
            SmemAllocator smem;
            k_tile.base = smem.take(KeyTile::kBytes);
            v_tile.base = smem.take(KeyTile::kBytes);
            q_tile.base = smem.take(RowTile::kBytes);
            dout_tile.base = smem.take(RowTile::kBytes);
            exchange = smem.take(kExchangeBytes);
            lse = smem.take(kStatisticBytes);
            lse_lo = smem.take(kStatisticBytes);
            delta = smem.take(kStatisticBytes);
            if (kJvp) {
                mu = smem.take(kStatisticBytes);
                beta = smem.take(kStatisticBytes);
                tk_tile.base = smem.take(KeyTile::kBytes);
                tv_tile.base = smem.take(KeyTile::kBytes);
                tq_tile.base = smem.take(RowTile::kBytes);
                dtout_tile.base = smem.take(RowTile::kBytes);
            }
        }

        DEVICE bool is_value_warp() const { return warp_index() < kPairs; }
        DEVICE int pair() const { return warp_index() % kPairs; }
        DEVICE int key_in_block() const { return 16 * pair(); }  // the first key of the warp

        DEVICE void load_keys() const {
            const auto load = [&](const KeyTile& tile, const Tensor& x, int columns) {
                load_tile<kThreads>(tile, sequence.keys_of(x, head_k, columns), first_key);
            };
            load(k_tile, p.k, p.head_dim);
            load(v_tile, p.v, p.head_dim_v);
            if (has_tk) load(tk_tile, p.tk, p.head_dim);
            if (has_tv) load(tv_tile, p.tv, p.head_dim_v);
        }

        // Whether a query from `row` on may not see all keys of the block.
        DEVICE bool hides_keys(int row) const {
            const int end = first_key + Keys;
            return kMasked || end > sequence.keys || sequence.first_query_of(end - 1) > row;
        }

        DEVICE bool sees_queries() const {
            return first_key < sequence.keys && first_row < sequence.queries;
        }

        // P (which = 0) and Tc (which = 1) of a thread in columns 8 i to 8 i + 7.
        DEVICE SharedAddress exchanged(int which, int i) const {
            return exchange + (pair() * (kJvp ? 2 : 1) + which) * kScoresBytes +
                   (i * 32 + lane_index()) * 16;
        }

        DEVICE void store_exchange(int which, const Scores& scores) const {
#pragma unroll
            for (int i = 0; i < scores.kBlocks; ++i)
                shared_store_words4(exchanged(which, i), scores.words(i));
        }

        DEVICE void load_exchange(int which, Scores& scores) const {
#pragma unroll
            for (int i = 0; i < scores.kBlocks; ++i)
                scores.set_words(i, shared_load_words4(exchanged(which, i)));
        }

        DEVICE float of_query(SharedAddress statistic, int i, int side) const {
            return shared_load_float(statistic + 4 * column_of(i, side));
        }

        DEVICE void store(const Tensor& target, const Gradient& gradient, int columns) const {
            if (!target.data) return;
            store_rows<Element>(sequence.key_rows_of(target, head_k, columns), GmemView{},
                                first_key + key_in_block(), gradient);
        }
    };

    // Loads the tiles of queries, head by head.
    struct QueryLoader {
        const Block& block;
        int head, row;  // of the next tile
        GmemView q, dout, tq, dtout;

        DEVICE explicit QueryLoader(const Block& b) : block(b), row(b.first_row) {
            enter(block.first_head);
        }

        DEVICE bool at_end() const { return head > block.last_head; }

        DEVICE void load() {
            load_tile<kThreads>(block.q_tile, q, row);
            if (block.has_dout) load_tile<kThreads>(block.dout_tile, dout, row);
            if (block.has_tq) load_tile<kThreads>(block.tq_tile, tq, row);
            if (block.has_dtout) load_tile<kThreads>(block.dtout_tile, dtout, row);
            copy_async_commit();
            load_statistics();

            row += Rows;
            if (row < block.sequence.queries) return;
            row = block.first_row;
            enter(head + 1);
        }

    private:
        DEVICE void enter(int next_head) {
            const AttentionParams& p = block.p;
            const auto queries_of = [&](const Tensor& x, int columns) {
                return block.sequence.queries_of(x, next_head, columns);
            };
            head = next_head;
            q = queries_of(p.q, p.head_dim);
            dout = queries_of(p.grad_out, p.head_dim_v);
            tq = queries_of(p.tq, p.head_dim);
            dtout = queries_of(p.grad_tout, p.head_dim_v);
        }

        DEVICE void load_statistics() const {
            const AttentionParams& p = block.p;
            const int thread = thread_index();
            if (thread >= Rows) return;
            const bool exists = row + thread < block.sequence.queries;
            const auto value = [&](const RowVector& x) {
                const float* source = block.sequence.rows_of(x, head) + row + thread;
                return x.data && exists ? global_load(source) : 0;
            };
            const auto store = [&](SharedAddress statistic, float x) {
                shared_store_float(statistic + 4 * thread, x);
            };
            store(block.lse, subtrahend_of(value(p.lse), true));
            store(block.lse_lo, value(p.lse_lo));
            store(block.delta, value(p.delta));
            if (kJvp) store(block.mu, value(p.mu));
            if (kJvp) store(block.beta, value(p.beta));
        }
    };

    template <class Warp>
    DEVICE static void stream(const Block& block) {
        Warp warp;
        if (block.sees_queries()) {
            block.load_keys();
            QueryLoader loader(block);
            loader.load();
#pragma unroll 1
            for (int head = block.first_head; head <= block.last_head; ++head)
#pragma unroll 1
                for (int row = block.first_row; row < block.sequence.queries; row += Rows) {
                    copy_async_wait<0>();
                    block_barrier();  // the queries have arrived
                    warp.compute(block, head, row);
                    block_barrier();  // P and Tc are in shared memory
                    warp.accumulate(block);
                    block_barrier();  // all warps have read the queries
                    if (!loader.at_end()) loader.load();
                }
        }
        warp.store(block);
    }

    struct ValueWarp {
        Gradient grad_v, grad_tv;
        Weights weights, weighted;

        DEVICE void compute(const Block& block, int head, int first_row) {
            const int row = block.key_in_block();
            Scores scores, tangents;
            multiply_transposed_with_tangent<Element>(scores, tangents, block.k_tile, block.tk_tile,
                                                      block.has_tk, row, block.q_tile,
                                                      block.tq_tile, block.has_tq);
            // mask S
            if (block.hides_keys(first_row))
                hide(block, scores, tangents, head, first_row);
            else
                scores.scale(block.p.softmax_scale);
            // P = exp(S − lse) and Tc = T − mu
            subtract_lse(block, scores);
#pragma unroll
            for (int i = 0; i < scores.kBlocks; ++i)
#pragma unroll
                for (int side = 0; side < 2; ++side) {
                    const float mu = kJvp ? block.of_query(block.mu, i, side) : 0;
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        float& score = scores.at(i, half, side);
                        score = fast_exp2(score);
                        float& tangent = tangents.at(i, half, side);
                        tangent = tangent * block.p.softmax_scale - mu;
                    }
                }
            block.store_exchange(0, scores);
            if (kJvp) block.store_exchange(1, tangents);
#pragma unroll
            for (int i = 0; i < scores.kBlocks; ++i)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float low = scores.at(i, half, 0), high = scores.at(i, half, 1);
                    weights.set(i, half, low, high);
                    if (kJvp)
                        weighted.set(i, half, low * tangents.at(i, half, 0),
                                     high * tangents.at(i, half, 1));
                }
        }

        DEVICE void accumulate(const Block& block) {
            if (block.has_dout) multiply<Element>(grad_v, weights, block.dout_tile);
            if (block.has_dtout && block.p.grad_tv.data)
                multiply<Element>(grad_v, weighted, grad_tv, weights, block.dtout_tile);
            else if (block.has_dtout)
                multiply<Element>(grad_v, weighted, block.dtout_tile);
        }

        DEVICE void store(const Block& block) {
            block.store(block.p.grad_v, grad_v, block.p.head_dim_v);
            if (kJvp) block.store(block.p.grad_tv, grad_tv, block.p.head_dim_v);
        }

        // Turns scores into S − lse in units of log2.
        DEVICE static void subtract_lse(const Block& block, Scores& scores) {
            static_assert(Rows <= 32, "a lane looks at one row");
            const float one_of_all = shared_load_float(block.lse + 4 * (lane_index() % Rows));
            const bool centres = warp_any(is_huge_lse(one_of_all));
#pragma unroll
            for (int i = 0; i < scores.kBlocks; ++i)
#pragma unroll
                for (int side = 0; side < 2; ++side) {
                    const float lse = block.of_query(block.lse, i, side);
                    if (centres) {
                        const float lse_lo = block.of_query(block.lse_lo, i, side);
#pragma unroll
                        for (int half = 0; half < 2; ++half)
                            scores.at(i, half, side) =
                                centred(scores.at(i, half, side), lse, lse_lo);
                    } else {
#pragma unroll
                        for (int half = 0; half < 2; ++half)
                            scores.at(i, half, side) =
                                fmaf(scores.at(i, half, side), kLog2E, -lse * kLog2E);
                    }
                }
        }

        // Turns products K Qᵀ into scores. Those of hidden keys become -inf, their tangents 0.
        DEVICE static void hide(const Block& block, Scores& scores, Scores& tangents, int head,
                                int first_row) {
            const MaskOfHead<Element> mask(block.p.mask, block.sequence.batch, head);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int key = block.first_key + block.key_in_block() + row_in_warp(half);
#pragma unroll
                for (int i = 0; i < scores.kBlocks; ++i)
#pragma unroll
                    for (int side = 0; side < 2; ++side) {
                        const int query = first_row + column_of(i, side);
                        float bias = 0;
                        if (key >= block.sequence.visible_keys(query))
                            bias = -kInfinity;
                        else if (kMasked)
                            bias = mask.bias(query, key);
                        const bool hidden = bias == -kInfinity;
                        float& score = scores.at(i, half, side);
                        score = hidden ? -kInfinity : fmaf(score, block.p.softmax_scale, bias);
                        if (hidden) tangents.at(i, half, side) = 0;
                    }
            }
        }
    };

    struct KeyWarp {
        Gradient grad_k, grad_tk;
        Scores x, bc;  // dO Vᵀ + dtO tVᵀ − delta and dtO Vᵀ − beta, transposed
        bool hides_keys;

        DEVICE void compute(const Block& block, int, int first_row) {
            hides_keys = block.hides_keys(first_row);
            const int row = block.key_in_block();
            x = Scores();
            bc = Scores();
            if (block.has_dout) multiply_transposed<Element>(x, block.v_tile, row, block.dout_tile);
            if (block.has_tv)
                multiply_transposed<Element>(bc, block.v_tile, x, block.tv_tile, row,
                                             block.dtout_tile);
            else if (block.has_dtout)
                multiply_transposed<Element>(bc, block.v_tile, row, block.dtout_tile);
#pragma unroll
            for (int i = 0; i < x.kBlocks; ++i)
#pragma unroll
                for (int side = 0; side < 2; ++side) {
                    const float delta = block.of_query(block.delta, i, side);
                    const float beta = kJvp ? block.of_query(block.beta, i, side) : 0;
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        x.at(i, half, side) -= delta;
                        bc.at(i, half, side) -= beta;
                    }
                }
        }

        DEVICE void accumulate(const Block& block) {
            Scores weights, tangents;
            block.load_exchange(0, weights);
            if (kJvp) block.load_exchange(1, tangents);
            if (hides_keys) {
                x.zero_unweighted(weights);
                bc.zero_unweighted(weights);
            }
            Weights ds, dt;
#pragma unroll
            for (int i = 0; i < x.kBlocks; ++i)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float low = weights.at(i, half, 0), high = weights.at(i, half, 1);
                    float x_low = x.at(i, half, 0), x_high = x.at(i, half, 1);
                    if (kJvp) {
                        const float bc_low = bc.at(i, half, 0), bc_high = bc.at(i, half, 1);
                        dt.set(i, half, low * bc_low, high * bc_high);
                        x_low += bc_low * tangents.at(i, half, 0);
                        x_high += bc_high * tangents.at(i, half, 1);
                    }
                    ds.set(i, half, low * x_low, high * x_high);
                }
            if (kJvp && block.p.grad_tk.data)
                multiply<Element>(grad_k, ds, grad_tk, dt, block.q_tile);
            else
                multiply<Element>(grad_k, ds, block.q_tile);
            if (block.has_tq) multiply<Element>(grad_k, dt, block.tq_tile);
        }

        DEVICE void store(const Block& block) {
            grad_k.scale(block.p.softmax_scale);
            grad_tk.scale(block.p.softmax_scale);
            block.store(block.p.grad_k, grad_k, block.p.head_dim);
            if (kJvp) block.store(block.p.grad_tk, grad_tk, block.p.head_dim);
        }
    };
};

}  // namespace jvp_attn
