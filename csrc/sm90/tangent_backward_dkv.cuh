// The gradients of K, V, tK and tV, through the output and its tangent: the equations of
// ../sm80/backward_dkv.cuh.
//
// A block has 64 keys of one head at a time; tiles of queries stream by in a ring, those of every
// query head that shares the keys. All is transposed: rows are keys, columns queries. The registers
// of one warpgroup cannot hold four gradients, so two share the keys, and each does half of the
// twelve products of a tile. The value warpgroup computes P and Tc, hands them over in shared
// memory, and adds to gV and gtV; the key warpgroup meanwhile computes Bc and
// gO Vᵀ + gT tVᵀ − delta, and then adds to gK and gtK. Of the third warpgroup one warp keeps the
// copy engine busy and one brings what is known of each query.
#pragma once

#include "matrix.cuh"
#include "sm90/ring.cuh"
#include "sm90/work.cuh"
#include "softmax.cuh"

namespace jvp_attn::sm90 {

template <class Element, int HeadDim, int Rows, int Keys>
struct TangentBackwardDkv {
    static_assert(Keys == 64, "those of a warpgroup");
    using RowTile = Tile<Rows, HeadDim>;
    using KeyTile = Tile<Keys, HeadDim>;
    using Scores = Accumulator<Rows>;
    using Weights = Packed<Element, Rows>;
    using Gradient = Accumulator<HeadDim>;

    static constexpr int kThreads = 3 * kWarpgroupThreads;
    static constexpr int kRowBox = Rows, kKeyBox = Keys;

    static constexpr int kStages = 2;
    using KeyRing = Ring<1, 4 * KeyTile::kBytes>;
    using QueryRing = Ring<kStages, 4 * RowTile::kBytes>;
    static constexpr int kScoresBytes = Keys * Rows * 4;
    static constexpr int kStatisticsBytes = 4 * Rows * 4;  // of a stage
    static constexpr int kSharedBytes = KeyRing::kBytes + QueryRing::kBytes + 2 * kScoresBytes +
                                        kStages * kStatisticsBytes + KeyRing::kBarrierBytes +
                                        QueryRing::kBarrierBytes + 8;
    static_assert(kSharedBytes <= kMaxSharedBytes);

    static int64_t work(const AttentionParams& p) {
        return int64_t{p.batch} * p.heads_k * ((p.seqlen_k + Keys - 1) / Keys);
    }

    DEVICE static void run(const Params& params) {
        const Memory memory;
        if (thread_index() == 0) memory.init();
        block_barrier();
        if (warpgroup_index() == 0) {
            release_registers<40>();
            if (warp_index() == 0) load_tiles(params, memory);
            if (warp_index() == 1) load_statistics(params, memory);
        } else {
            claim_registers<232>();
            // Before the first tile nothing is left to take; nobody waits for the last arrival but
            // here.
            if (warpgroup_index() == 1) {
                consume<ValueWarpgroup>(params, memory);
                named_barrier_sync(kTaken, kConsumerThreads);
            } else {
                named_barrier_arrive(kTaken, kConsumerThreads);
                consume<KeyWarpgroup>(params, memory);
            }
        }
    }

private:
    // The keys that the warpgroups work on at a time, and the queries that see any of them.
    struct Block {
        Sequence sequence;
        int head_k;
        int first_key;
        int first_row;
        int first_head, last_head;  // of the query heads that share the keys

        // Successive pieces share a head, and so its queries in the cache; of a causal head that
        // with the most queries comes first.
        DEVICE Block(const AttentionParams& p, int piece)
            : sequence(p, piece / ceil_div(p.seqlen_k, Keys) / p.heads_k),
              head_k(piece / ceil_div(p.seqlen_k, Keys) % p.heads_k),
              first_key(piece % ceil_div(p.seqlen_k, Keys) * Keys),
              first_row(sequence.first_query_of(first_key)),
              first_head(head_k * (p.heads / p.heads_k)),
              last_head(first_head + p.heads / p.heads_k - 1) {}

        DEVICE bool is_empty() const { return first_key >= sequence.key_rows; }

        DEVICE bool sees_queries() const {
            return first_key < sequence.keys && first_row < sequence.queries;
        }

        // Whether a tile of queries from `row` on may not see all keys of the block.
        DEVICE bool hides_keys(int row) const {
            const int end = first_key + Keys;
            return end > sequence.keys || sequence.first_query_of(end - 1) > row;
        }
    };

    // What is where in shared memory.
    struct Memory {
        KeyRing keys;
        QueryRing queries;
        SharedAddress exchange, statistics;
        SharedAddress landed;  // an mbarrier

        DEVICE Memory() {
            SharedAddress next = shared_memory();
            const auto take = [&](int bytes) {
                const SharedAddress start = next;
                next += bytes;
                return start;
            };
            keys.slots = take(KeyRing::kBytes);
            queries.slots = take(QueryRing::kBytes);
            exchange = take(2 * kScoresBytes);
            statistics = take(kStages * kStatisticsBytes);
            keys.barriers = take(KeyRing::kBarrierBytes);
            queries.barriers = take(QueryRing::kBarrierBytes);
            landed = take(8);
        }

        DEVICE void init() const {
            keys.init(1, kConsumerWarps);
            queries.init(1 + 32, kConsumerWarps);  // the copy engine, and the lanes of a warp
            mbarrier_init(landed, 1);
            fence_mbarrier_init();
        }

        DEVICE KeyTile key_tile(int which) const { return {keys.slots + which * KeyTile::kBytes}; }
        DEVICE KeyTile k() const { return key_tile(0); }
        DEVICE KeyTile v() const { return key_tile(1); }
        DEVICE KeyTile tk() const { return key_tile(2); }
        DEVICE KeyTile tv() const { return key_tile(3); }

        // Of two successive queries, lse and mu (which = 0) or beta and delta (which = 1): four
        // float32.
        DEVICE SharedAddress statistics_of(int slot, int pair, int which) const {
            return statistics + slot * kStatisticsBytes + (which * Rows / 2 + pair) * 16;
        }

        // Where a thread finds P (which = 0) and Tc (which = 1) of 8 queries.
        DEVICE SharedAddress handed_over(int which, int block) const {
            const int thread = thread_index() % kWarpgroupThreads;
            return exchange + which * kScoresBytes + (block * kWarpgroupThreads + thread) * 16;
        }
    };
    static constexpr int kConsumerWarps = 8;

    // Named barriers of the two warpgroups that multiply.
    enum Barrier { kHandedOver = 1, kTaken = 2 };
    static constexpr int kConsumerThreads = 2 * kWarpgroupThreads;

    // A slot of the ring of queries.
    struct Queries {
        RowTile q, go, tq, gt;

        DEVICE explicit Queries(SharedAddress slot)
            : q{slot},
              go{slot + RowTile::kBytes},
              tq{slot + 2 * RowTile::kBytes},
              gt{slot + 3 * RowTile::kBytes} {}
    };

    // Which inputs there are.
    struct Presence {
        bool tq, tk, tv, go, gt;

        DEVICE explicit Presence(const AttentionParams& p)
            : tq(p.tq.data),
              tk(p.tk.data),
              tv(p.tv.data && p.grad_tout.data),
              go(p.grad_out.data),
              gt(p.grad_tout.data) {}
    };

    // Calls for each tile of queries that a block works on: with its head and its first row.
    template <class Function>
    DEVICE static void for_each_tile(const Block& block, const Function& function) {
        if (!block.sees_queries()) return;
#pragma unroll 1
        for (int head = block.first_head; head <= block.last_head; ++head)
#pragma unroll 1
            for (int row = block.first_row; row < block.sequence.queries; row += Rows)
                function(head, row);
    }

    // -----------------------------------------------------------------------------------------
    // Loading

    DEVICE static void load_tiles(const Params& params, const Memory& memory) {
        const AttentionParams& p = params.attention;
        clear_absent(p, memory);
        Position<1> key_at;
        Position<kStages> at;
        int landed_phase = 0;
        for (Turn turn(params); turn; turn.next()) {
            const Block block(p, turn.piece());
            if (!block.sees_queries()) continue;
            load_keys(params, memory, block, key_at);
            key_at.advance();
            for_each_tile(block, [&](int head, int row) {
                load_queries(params, memory, block, head, row, at, landed_phase);
                at.advance();
            });
        }
    }

    // What is absent and multiplied all the same is zero.
    DEVICE static void clear_absent(const AttentionParams& p, const Memory& memory) {
        const Presence has(p);
        for (Position<kStages> at; at.phase == 0; at.advance()) {
            const Queries queries(memory.queries.slot(at));
            if (!has.go) clear_rows(queries.go, 0);
            if (!has.tq) clear_rows(queries.tq, 0);
            if (!has.gt) clear_rows(queries.gt, 0);
        }
        fence_proxy_async();
        warp_barrier();
    }

    DEVICE static void load_keys(const Params& params, const Memory& memory, const Block& block,
                                 const Position<1>& at) {
        const AttentionParams& p = params.attention;
        const Presence has(p);
        memory.keys.wait_empty(at);
        if (elect_one()) {
            const SharedAddress full = memory.keys.full(at);
            const int first = static_cast<int>(block.sequence.first_key);
            const int batch = p.cu_seqlens_k ? 0 : block.sequence.batch;
            const auto load = [&](const KeyTile& tile, const TensorMap& map) {
                load_tile(tile, {map, first, block.head_k, batch}, block.first_key, full);
            };
            mbarrier_arrive_expect(full, (2 + has.tk + has.tv) * KeyTile::kBytes);
            load(memory.k(), params.maps.k);
            load(memory.v(), params.maps.v);
            if (has.tk) load(memory.tk(), params.maps.tk);
            if (has.tv) load(memory.tv(), params.maps.tv);
        }
        warp_barrier();
    }

    DEVICE static void load_queries(const Params& params, const Memory& memory, const Block& block,
                                    int head, int row, const Position<kStages>& at,
                                    int& landed_phase) {
        const AttentionParams& p = params.attention;
        const Presence has(p);
        const Queries queries(memory.queries.slot(at));
        const SharedAddress full = memory.queries.full(at);
        const int rows = block.sequence.queries - row;
        // Rows of another sequence follow; they become zeros.
        const bool foreign = p.cu_seqlens_q && rows < Rows;
        const SharedAddress landed = foreign ? memory.landed : full;
        memory.queries.wait_empty(at);
        if (elect_one()) {
            const int first = static_cast<int>(block.sequence.first_query);
            const int batch = p.cu_seqlens_q ? 0 : block.sequence.batch;
            const auto load = [&](const RowTile& tile, const TensorMap& map) {
                load_tile(tile, {map, first, head, batch}, row, landed);
            };
            mbarrier_arrive_expect(landed, (1 + has.go + has.tq + has.gt) * RowTile::kBytes);
            load(queries.q, params.maps.q);
            if (has.go) load(queries.go, params.maps.grad_out);
            if (has.tq) load(queries.tq, params.maps.tq);
            if (has.gt) load(queries.gt, params.maps.grad_tout);
        }
        warp_barrier();
        if (!foreign) return;

        mbarrier_wait(landed, landed_phase);
        landed_phase ^= 1;
        clear_rows(queries.q, rows);
        if (has.go) clear_rows(queries.go, rows);
        if (has.tq) clear_rows(queries.tq, rows);
        if (has.gt) clear_rows(queries.gt, rows);
        fence_proxy_async();
        warp_barrier();
        if (elect_one()) mbarrier_arrive(full);
    }

    // What is known of the queries beforehand, of two at a time by each lane.
    DEVICE static void load_statistics(const Params& params, const Memory& memory) {
        const AttentionParams& p = params.attention;
        Position<kStages> at;
        for (Turn turn(params); turn; turn.next()) {
            const Block block(p, turn.piece());
            for_each_tile(block, [&](int head, int first_row) {
                const auto load = [&](const RowVector& x, int row, float beyond) {
                    return row < block.sequence.queries
                               ? global_load(block.sequence.rows_of(x, head) + row)
                               : beyond;
                };
                memory.queries.wait_empty(at);
                for (int pair = lane_index(); pair < Rows / 2; pair += 32) {
                    const int row = first_row + 2 * pair;
                    const auto store = [&](int which, float a, float b, float c, float d) {
                        shared_store_floats4(memory.statistics_of(at.slot, pair, which),
                                             {a, b, c, d});
                    };
                    store(0, log2_of_sum(load(p.lse, row, -kInfinity)),
                          log2_of_sum(load(p.lse, row + 1, -kInfinity)), load(p.mu, row, 0),
                          load(p.mu, row + 1, 0));
                    store(1, load(p.beta, row, 0), load(p.beta, row + 1, 0), load(p.delta, row, 0),
                          load(p.delta, row + 1, 0));
                }
                mbarrier_arrive(memory.queries.full(at));
                at.advance();
            });
        }
    }

    // -----------------------------------------------------------------------------------------
    // Multiplying

    // A tile of queries, and what the warpgroups do with it.
    struct Step {
        const AttentionParams& p;
        const Memory& memory;
        const Presence has;
        const Block& block;
        int slot;
        int first_row;
        Queries queries;

        // Numbers of the two queries of a thread among 8: those of one kind, then of the other.
        DEVICE Floats4 statistics(int which, int i) const {
            return shared_load_floats4(memory.statistics_of(slot, 4 * i + lane_index() % 4, which));
        }
    };

    template <class Warpgroup>
    DEVICE static void consume(const Params& params, const Memory& memory) {
        const AttentionParams& p = params.attention;
        const auto release = [&](const auto& ring, const auto& at) {
            warp_barrier();
            if (lane_index() == 0) ring.release(at);
        };
        Position<1> key_at;
        Position<kStages> at;
        for (Turn turn(params); turn; turn.next()) {
            const Block block(p, turn.piece());
            if (block.is_empty()) continue;
            Warpgroup warpgroup;
            if (block.sees_queries()) {
                memory.keys.wait_full(key_at);
                for_each_tile(block, [&](int, int row) {
                    memory.queries.wait_full(at);
                    warpgroup.add(Step{p, memory, Presence(p), block, at.slot, row,
                                       Queries(memory.queries.slot(at))});
                    release(memory.queries, at);
                    at.advance();
                });
                release(memory.keys, key_at);
                key_at.advance();
            }
            warpgroup.store(p, block);
        }
    }

    DEVICE static void store(const AttentionParams& p, const Block& block, const Tensor& target,
                             const Gradient& gradient, int columns) {
        if (!target.data) return;
        store_rows<Element>(block.sequence.key_rows_of(target, block.head_k, columns), Matrix{},
                            block.first_key + key_in_block(), gradient);
    }

    // The first key of a warp.
    DEVICE static int key_in_block() { return warp_index() % 4 * 16; }

    struct ValueWarpgroup {
        Gradient grad_v, grad_tv;

        DEVICE void add(const Step& step) {
            const Memory& memory = step.memory;
            const float scale = step.p.softmax_scale;

            Scores weights;
            pin(weights.value);
            wgmma_fence();
            multiply_transposed<Element>(weights, memory.k(), 0, step.queries.q, false);
            wgmma_commit();
            wgmma_wait<0>();
            pin(weights.value);
            exponentiate(weights, step);
            named_barrier_sync(kTaken, kConsumerThreads);
            hand_over(memory, 0, weights);
            Weights rounded;
            round_weights(rounded, weights);

            Scores tangents;
            pin(tangents.value);
            pin(rounded.word);
            pin(grad_v.value);
            pin(grad_tv.value);
            wgmma_fence();
            multiply_transposed<Element>(tangents, memory.k(), 0, step.queries.tq, false);
            if (step.has.tk)
                multiply_transposed<Element>(tangents, memory.tk(), 0, step.queries.q, true);
            wgmma_commit();
            multiply<Element>(grad_tv, rounded, step.queries.gt);
            if (step.has.go) multiply<Element>(grad_v, rounded, step.queries.go);
            wgmma_commit();
            wgmma_wait<1>();
            pin(tangents.value);

            Weights weighted;
#pragma unroll
            for (int i = 0; i < tangents.kBlocks; ++i) {
                const Floats4 known = step.statistics(0, i);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
#pragma unroll
                    for (int side = 0; side < 2; ++side) {
                        float& tangent = tangents.at(i, half, side);
                        const float centred = tangent * scale - known.value[2 + side];
                        // Of a hidden key it may be infinite, and 0 · inf is NaN.
                        tangent = weights.at(i, half, side) == 0 ? 0 : centred;
                    }
                    weighted.set(i, half, weights.at(i, half, 0) * tangents.at(i, half, 0),
                                 weights.at(i, half, 1) * tangents.at(i, half, 1));
                }
            }
            hand_over(memory, 1, tangents);
            named_barrier_arrive(kHandedOver, kConsumerThreads);

            pin(weighted.word);
            wgmma_fence();
            multiply<Element>(grad_v, weighted, step.queries.gt);
            wgmma_commit();
            wgmma_wait<0>();
            pin(grad_v.value);
            pin(grad_tv.value);
            pin(rounded.word);
            pin(weighted.word);
        }

        DEVICE void store(const AttentionParams& p, const Block& block) const {
            TangentBackwardDkv::store(p, block, p.grad_v, grad_v, p.head_dim_v);
            TangentBackwardDkv::store(p, block, p.grad_tv, grad_tv, p.head_dim_v);
        }

    private:
        // Scores become weights; those of hidden keys are 0.
        DEVICE static void exponentiate(Scores& scores, const Step& step) {
            const float scale = step.p.softmax_scale * kLog2E;
#pragma unroll
            for (int i = 0; i < scores.kBlocks; ++i) {
                const Floats4 known = step.statistics(0, i);
#pragma unroll
                for (int half = 0; half < 2; ++half)
#pragma unroll
                    for (int side = 0; side < 2; ++side) {
                        float& score = scores.at(i, half, side);
                        score = score * scale - known.value[side];
                    }
            }
            if (step.block.hides_keys(step.first_row)) hide(scores, step);
#pragma unroll
            for (int i = 0; i < scores.kBlocks; ++i)
#pragma unroll
                for (int e = 0; e < 4; ++e) scores.value[i][e] = fast_exp2(scores.value[i][e]);
        }

        DEVICE static void hide(Scores& scores, const Step& step) {
            const Sequence& sequence = step.block.sequence;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int key = step.block.first_key + key_in_block() + row_in_warp(half);
                const int first =
                    key < sequence.keys ? sequence.first_query_of(key) : sequence.queries;
                const int hidden = first - step.first_row - column_of(0, 0);
#pragma unroll
                for (int i = 0; i < scores.kBlocks; ++i)
#pragma unroll
                    for (int side = 0; side < 2; ++side)
                        if (8 * i + side < hidden) scores.at(i, half, side) = -kInfinity;
            }
        }

        DEVICE static void hand_over(const Memory& memory, int which, const Scores& scores) {
#pragma unroll
            for (int i = 0; i < scores.kBlocks; ++i)
                shared_store_words4(memory.handed_over(which, i), scores.words(i));
        }
    };

    struct KeyWarpgroup {
        Gradient grad_k, grad_tk;

        DEVICE void add(const Step& step) {
            const Memory& memory = step.memory;
            const Queries& queries = step.queries;

            Scores bc, x;
            pin(bc.value);
            pin(x.value);
            wgmma_fence();
            multiply_transposed<Element>(bc, memory.v(), 0, queries.gt, false);
            wgmma_commit();
            multiply_transposed<Element>(x, memory.v(), 0, queries.go, false);
            if (step.has.tv) multiply_transposed<Element>(x, memory.tv(), 0, queries.gt, true);
            wgmma_commit();
            wgmma_wait<0>();
            pin(bc.value);
            pin(x.value);

            named_barrier_sync(kHandedOver, kConsumerThreads);
            Weights sbar, tbar;
#pragma unroll
            for (int i = 0; i < x.kBlocks; ++i) {
                const Floats4 weights = shared_load_floats4(memory.handed_over(0, i));
                const Floats4 tangents = shared_load_floats4(memory.handed_over(1, i));
                const Floats4 known = step.statistics(1, i);
                float s[4], t[4];
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const float b = bc.value[i][e] - known.value[e % 2];
                    const float a = x.value[i][e] - known.value[2 + e % 2] + b * tangents.value[e];
                    // Where a weight is 0 these may be infinite, and 0 · inf is NaN.
                    t[e] = weights.value[e] == 0 ? 0 : weights.value[e] * b;
                    s[e] = weights.value[e] == 0 ? 0 : weights.value[e] * a;
                }
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    sbar.set(i, half, s[2 * half], s[2 * half + 1]);
                    tbar.set(i, half, t[2 * half], t[2 * half + 1]);
                }
            }
            named_barrier_arrive(kTaken, kConsumerThreads);

            pin(sbar.word);
            pin(tbar.word);
            pin(grad_k.value);
            pin(grad_tk.value);
            wgmma_fence();
            multiply<Element>(grad_tk, tbar, queries.q);
            multiply<Element>(grad_k, sbar, queries.q);
            if (step.has.tq) multiply<Element>(grad_k, tbar, queries.tq);
            wgmma_commit();
            wgmma_wait<0>();
            pin(grad_k.value);
            pin(grad_tk.value);
            pin(sbar.word);
            pin(tbar.word);
        }

        DEVICE void store(const AttentionParams& p, const Block& block) {
            grad_k.scale(p.softmax_scale);
            grad_tk.scale(p.softmax_scale);
            TangentBackwardDkv::store(p, block, p.grad_k, grad_k, p.head_dim);
            TangentBackwardDkv::store(p, block, p.grad_tk, grad_tk, p.head_dim);
        }
    };
};

}  // namespace jvp_attn::sm90
