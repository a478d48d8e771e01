// A small kernel that uses most instructions of compute capability 9.0, with an optional fault.
//
// For 128 rows Q, and for keys K and values V in tiles of 64, it computes (Q Kᵀ) V, the products
// Q Kᵀ rounded to bfloat16. One thread loads the tiles, two warpgroups multiply 64 rows each.
// They multiply with V twice, with the left operand in registers and in shared memory. Each thread
// also sums the first elements of some keys, as a reader through the generic proxy.
//
// The warpgroups take turns, except in kernels with other faults, of which turns hide some.
//
// Warps add their parts of the first 8 columns of the product to mu, lane by lane, and threads add
// their sums of keys to delta.
//
// params: q (batch, 128, 64), k (batch, keys, 64), v (batch, keys, 128), contiguous bfloat16; out
// and tout (batch, 128, 128) float32; lse (batch, 256) float32; mu (batch, 128) and delta
// (batch, 64) float32 zeros; seqlen_k keys, a multiple of 64. One block for each entry of
// the batch, at most as many as there are multiprocessors.
#pragma once

#include "sm90/launch.cuh"
#include "sm90/tile.cuh"
#include "sm90/turns.cuh"

namespace jvp_attn::sm90 {

enum class Fault {
    none,
    missing_proxy_fence,
    missing_proxy_fence_after_read,
    missing_named_barrier,
    named_barrier_of_too_many,
    named_barrier_counts_differ,
    turn_passed_twice,
    turn_never_passed,
    turn_passed_to_itself,
    turn_left_over,
    address_differs_between_lanes,
    missing_barrier_after_init,
    missing_init_fence,
    no_mbarrier,
    wrong_phase,
    constant_phase,
    expects_too_much,
    expects_too_little,
    missing_arrival,
    too_many_arrivals,
    missing_wait_for_empty,
    released_too_early,
    misaligned_tma_target,
    null_tensor_map,
    unfinished_tma_load,
    missing_wgmma_fence,
    missing_wgmma_wait,
    missing_wgmma_commit,
    unfinished_wgmma,
    accumulator_changed,
    accumulator_fenced,
    operand_changed,
    operand_changed_after_fence,
    wrong_leading_offset,
    wrong_stride_offset,
    misaligned_descriptor,
    other_swizzle,
    divergent_wgmma,
    warp_without_wgmma,
    too_many_registers,
    fewer_registers,
    different_registers,
    store_instead_of_add,
    store_where_others_add,
    read_where_others_add,
    add_out_of_range,
    misaligned_add,
    add_in_flight,
};

template <Fault kFault>
struct TileProducts {
    static constexpr int kRows = 128, kKeys = 64, kHeadDim = 64, kValueDim = 128;
    static constexpr int kThreads = 3 * kWarpgroupThreads;
    static constexpr int kRowBox = kRows, kKeyBox = kKeys;
    static constexpr int kSlots = 2;
    static constexpr int kFirstTurnBarrier = 3;
    using Turn = Turns<2, kFirstTurnBarrier>;
    static constexpr bool kTurns = kFault == Fault::none || kFault == Fault::turn_passed_twice ||
                                   kFault == Fault::turn_never_passed ||
                                   kFault == Fault::turn_passed_to_itself ||
                                   kFault == Fault::turn_left_over;

    using QTile = Tile<kRows, kHeadDim>;
    using KTile = Tile<kKeys, kHeadDim>;
    using VTile = Tile<kKeys, kValueDim>;
    using WeightTile = Tile<kRows, kKeys>;
    static constexpr int kSlotBytes = KTile::kBytes + VTile::kBytes;
    static constexpr int kBarriers = QTile::kBytes + WeightTile::kBytes + kSlots * kSlotBytes;
    static constexpr int kSharedBytes = kBarriers + 8 * (1 + 2 * kSlots);

    static std::string why_not(const AttentionParams&) { return ""; }
    static int64_t work(const AttentionParams& p) { return p.batch; }

    DEVICE static void run(const Params& params) {
        if (thread_index() == 0) {
            mbarrier_init(q_full(), 1);
            for (int slot = 0; slot < kSlots; ++slot) {
                mbarrier_init(full(slot), has(Fault::missing_arrival) ? 2 : 1);
                mbarrier_init(empty(slot), 2 * kWarpgroupThreads);
            }
            if (!has(Fault::missing_init_fence)) fence_mbarrier_init();
        }
        if (!has(Fault::missing_barrier_after_init)) block_barrier();
        if (warpgroup_index() == 0) {
            warpgroup_reg_dealloc<24>();
            if (warp_index() == 0 && elect_one()) load(params);
        } else {
            request_registers();
            if (kTurns) Turn::begin();
            multiply(params.attention);
            if (kTurns && !has(Fault::turn_left_over)) Turn::end();
        }
    }

private:
    DEVICE static constexpr bool has(Fault fault) { return kFault == fault; }

    DEVICE static QTile q_tile() { return {shared_memory()}; }
    DEVICE static WeightTile weight_tile() { return {shared_memory() + QTile::kBytes}; }
    DEVICE static KTile k_tile_of_warp(int slot) {
        SharedAddress base = k_tile(slot).base;
        if (has(Fault::address_differs_between_lanes) && lane_index() == 5) base += kSwizzleBytes;
        return {warp_uniform(base)};
    }
    DEVICE static KTile k_tile(int slot) {
        return {shared_memory() + QTile::kBytes + WeightTile::kBytes + slot * kSlotBytes};
    }
    DEVICE static VTile v_tile(int slot) { return {k_tile(slot).base + KTile::kBytes}; }
    DEVICE static SharedAddress q_full() { return shared_memory() + kBarriers; }
    DEVICE static SharedAddress full(int slot) { return q_full() + 8 + 16 * slot; }
    DEVICE static SharedAddress empty(int slot) { return full(slot) + 8; }

    DEVICE static void request_registers() {
        if (has(Fault::too_many_registers)) {
            warpgroup_reg_alloc<248>();
        } else if (has(Fault::fewer_registers)) {
            warpgroup_reg_alloc<160>();
        } else if (has(Fault::different_registers) && thread_index() % 128 < 32) {
            warpgroup_reg_alloc<232>();
        } else {
            warpgroup_reg_alloc<240>();
        }
    }

    DEVICE static void load(const Params& params) {
        const int batch = block_index();
        mbarrier_arrive_expect(q_full(), QTile::kBytes);
        tma_load_4d(q_tile().base, has(Fault::null_tensor_map) ? params.maps.tq : params.maps.q,
                    q_full(), 0, 0, 0, batch);
        const int tiles = params.attention.seqlen_k / kKeys;
        for (int tile = 0; tile < tiles; ++tile) {
            const int slot = tile % kSlots, round = tile / kSlots % 2;
            if (!has(Fault::missing_wait_for_empty)) mbarrier_wait(empty(slot), round ^ 1);
            load_slot(params, slot, tile * kKeys);
        }
        if (has(Fault::unfinished_tma_load)) {
            mbarrier_wait(empty(tiles % kSlots), tiles / kSlots % 2 ^ 1);
            load_slot(params, tiles % kSlots, 0);
        }
    }

    DEVICE static void load_slot(const Params& params, int slot, int key) {
        const int batch = block_index();
        int bytes = kSlotBytes;
        if (has(Fault::expects_too_much)) bytes += 16;
        if (has(Fault::expects_too_little)) bytes -= KTile::kBytes;
        mbarrier_arrive_expect(full(slot), bytes);
        const SharedAddress k = k_tile(slot).base + (has(Fault::misaligned_tma_target) ? 128 : 0);
        tma_load_4d(k, params.maps.k, full(slot), 0, key, 0, batch);
        for (int panel = 0; panel < VTile::kPanels; ++panel)
            tma_load_4d(v_tile(slot).base + panel * VTile::kPanelBytes, params.maps.v, full(slot),
                        panel * kPanelColumns, key, 0, batch);
    }

    DEVICE static void multiply(const AttentionParams& p) {
        const int thread = thread_index() % kWarpgroupThreads;
        const int row = (warpgroup_index() - 1) * 64;
        float key_sum = 0;
        Accumulator<kValueDim> from_registers, from_shared;
        mbarrier_wait(q_full(), 0);
        for (int tile = 0; tile < p.seqlen_k / kKeys; ++tile) {
            const int slot = tile % kSlots, round = tile / kSlots % 2;
            mbarrier_wait(full(slot) + (has(Fault::no_mbarrier) ? 1024 : 0),
                          has(Fault::constant_phase) ? 0 : round ^ has(Fault::wrong_phase));

            if (has(Fault::warp_without_wgmma) && thread >= 96) return;
            if (kTurns) Turn::await();
            Accumulator<kKeys> scores;
            start_scores(scores, row, slot);
            if (!has(Fault::missing_wgmma_commit)) wgmma_commit();
            if (!has(Fault::missing_wgmma_wait)) wgmma_wait<0>();
            if (has(Fault::accumulator_fenced)) start_scores(scores, row, slot);
            if (!has(Fault::missing_wgmma_wait) && !has(Fault::missing_wgmma_commit))
                warpgroup_fence_operand(scores.value);

            Packed<Bf16, kKeys> weights;
            for (int i = 0; i < scores.kBlocks; ++i)
                for (int half = 0; half < 2; ++half)
                    weights.set(i, half, scores.at(i, half, 0), scores.at(i, half, 1));
            put(weights, row);
            const Words4 key = shared_load_words4(k_tile(slot).chunk(thread % kKeys, 0));
            key_sum += unpack_low<Bf16>(key.word[0]);

            start_sums(from_registers, from_shared, weights, row, slot);
            wgmma_commit();
            if (has(Fault::add_in_flight)) add_up(p, from_registers, key_sum);
            if (kTurns) pass_turn(tile);
            if (has(Fault::accumulator_changed)) from_shared.value[3][1] += 1;
            if (has(Fault::operand_changed)) weights.word[1][2] = 0;
            if (has(Fault::released_too_early)) release(slot);
            if (has(Fault::unfinished_wgmma) && tile == p.seqlen_k / kKeys - 1) return;
            wgmma_wait<0>();
            warpgroup_fence_operand(from_registers.value);
            warpgroup_fence_operand(from_shared.value);
            warpgroup_fence_operand(weights.word);
            if (!has(Fault::released_too_early)) release(slot);
            if (has(Fault::too_many_arrivals)) mbarrier_arrive(empty(slot));
        }

        const int place = block_index() * kRows + row + thread / 32 * 16;
        store(static_cast<float*>(p.out.data) + place * kValueDim, from_registers);
        store(static_cast<float*>(p.tout.data) + place * kValueDim, from_shared);
        global_store(p.lse.data + block_index() * 2 * kRows + 2 * row + thread, key_sum);
        add_up(p, from_registers, key_sum);
    }

    DEVICE static void add_up(const AttentionParams& p, const Accumulator<kValueDim>& product,
                              float key_sum) {
        int first = block_index() * 128 + 4 * lane_index();
        if (has(Fault::misaligned_add)) first += 2;
        if (has(Fault::add_out_of_range)) first += p.batch * 128;
        global_add4(p.mu.data + first, product.value[0]);

        float* const of_key = p.delta.data + block_index() * kKeys + thread_index() % kKeys;
        const bool is_first = warpgroup_index() == 1 && thread_index() % 128 < kKeys;
        if (has(Fault::store_instead_of_add))
            global_store(of_key, global_load(of_key) + key_sum);
        else if (has(Fault::store_where_others_add) && is_first)
            global_store(of_key, key_sum);
        else
            global_add(of_key, key_sum);
        if (has(Fault::read_where_others_add)) global_load(of_key);
    }

    DEVICE static void start_scores(Accumulator<kKeys>& scores, int row, int slot) {
        const bool other = has(Fault::divergent_wgmma) && thread_index() % 128 / 32 == 2;
        if (!has(Fault::accumulator_fenced)) warpgroup_fence_operand(scores.value);
        if (!has(Fault::missing_wgmma_fence)) wgmma_fence();
        for (int step = 0; step < kHeadDim / 16; ++step) {
            uint64_t q = q_tile().columns(row, other ? step ^ 1 : step);
            if (has(Fault::misaligned_descriptor)) q += kPanelRowBytes >> 4;
            if (has(Fault::other_swizzle)) q ^= uint64_t{3} << 62;
            wgmma<Bf16, Major::contraction, Major::contraction>(
                scores.value, q, k_tile_of_warp(slot).columns(0, step), step > 0);
        }
    }

    // Warpgroup 1 makes the faults, after its second tile.
    DEVICE static void pass_turn(int tile) {
        const bool faulty = tile == 1 && warpgroup_index() == 1;
        if (has(Fault::turn_never_passed) && faulty) return;
        if (has(Fault::turn_passed_to_itself) && faulty)
            return named_barrier_arrive(kFirstTurnBarrier, 2 * kWarpgroupThreads);
        Turn::pass();
        if (has(Fault::turn_passed_twice) && faulty) Turn::pass();
    }

    // Stores the weights in shared memory, as an operand.
    DEVICE static void put(const Packed<Bf16, kKeys>& weights, int row) {
        const int lane = lane_index(), warp_row = row + warp_index() % 4 * 16;
        for (int step = 0; step < kKeys / 16; ++step)
            store_matrices(weight_tile().chunk(warp_row + lane % 16, 2 * step + lane / 16),
                           weights.fragment(step));
        if (!has(Fault::missing_proxy_fence)) fence_proxy_async();
        if (has(Fault::missing_named_barrier)) return;
        int threads = kWarpgroupThreads;
        if (has(Fault::named_barrier_of_too_many)) threads += 32;
        if (has(Fault::named_barrier_counts_differ) && warp_index() % 2 == 1) threads += 128;
        named_barrier_sync(warpgroup_index(), threads);
    }

    DEVICE static void start_sums(Accumulator<kValueDim>& from_registers,
                                  Accumulator<kValueDim>& from_shared, Packed<Bf16, kKeys>& weights,
                                  int row, int slot) {
        warpgroup_fence_operand(from_registers.value);
        warpgroup_fence_operand(from_shared.value);
        warpgroup_fence_operand(weights.word);
        wgmma_fence();
        for (int step = 0; step < kKeys / 16; ++step) {
            if (has(Fault::operand_changed_after_fence)) weights.word[step][0] = 0;
            uint64_t v = v_tile(slot).rows(step);
            if (has(Fault::wrong_leading_offset)) v ^= uint64_t{VTile::kPanelBytes / 2 >> 4} << 16;
            if (has(Fault::wrong_stride_offset)) v ^= uint64_t{2 * kSwizzleBytes >> 4} << 32;
            wgmma<Bf16, Major::result>(from_registers.value, weights.word[step], v, true);
            wgmma<Bf16, Major::contraction, Major::result>(
                from_shared.value, weight_tile().columns(row, step), v, true);
        }
    }

    DEVICE static void release(int slot) {
        if (!has(Fault::missing_proxy_fence_after_read)) fence_proxy_async();
        mbarrier_arrive(empty(slot));
    }

    DEVICE static void store(float* rows, const Accumulator<kValueDim>& sums) {
        for (int i = 0; i < sums.kBlocks; ++i)
            for (int half = 0; half < 2; ++half)
                for (int side = 0; side < 2; ++side)
                    global_store(rows + row_in_warp(half) * kValueDim + column_of(i, side),
                                 sums.at(i, half, side));
    }
};

}  // namespace jvp_attn::sm90
