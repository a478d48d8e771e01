// Kernels that test the instructions of csrc/sm90/ptx.cuh. Most compute an array in params.out from
// one in params.q.
#pragma once

#include "sm90/launch.cuh"
#include "sm90/tile.cuh"

namespace jvp_attn::sm90 {

template <class Value>
DEVICE const Value* input(const Params& params) {
    return static_cast<const Value*>(params.attention.q.data);
}

template <class Value>
DEVICE Value* output(const Params& params) {
    return static_cast<Value*>(params.attention.out.data);
}

// The members of kernels without tensor maps.
template <int Count>
struct Threads {
    static constexpr int kThreads = Count;
    static constexpr int kSharedBytes = 0;
    static constexpr int kRowBox = 8, kKeyBox = 8;
    static std::string why_not(const AttentionParams&) { return ""; }
    static int64_t work(const AttentionParams&) { return 1; }
};

// ---------------------------------------------------------------------------------------------
// Warpgroups and their registers

// For each thread: its warpgroup, its index again, how many lanes elect_one chooses, and whether it
// chooses other lanes the next time.
struct Identities : Threads<256> {
    DEVICE static void run(const Params& params) {
        uint32_t* const row = output<uint32_t>(params) + 4 * thread_index();
        global_store(row, static_cast<uint32_t>(warpgroup_index()));
        global_store(row + 1, static_cast<uint32_t>(opaque(thread_index())));
        const bool elected = elect_one();
        float count = elected;
        for (int mask = 1; mask < 32; mask *= 2) count += shuffle_xor(count, mask);
        global_store(row + 2, static_cast<uint32_t>(count));
        global_store(row + 3, static_cast<uint32_t>(warp_any(elect_one() != elected)));
    }
};

// Three warpgroups, of which one gives registers to the others: their index, as float32.
struct ShareRegisters : Threads<384> {
    DEVICE static void run(const Params& params) {
        if (warpgroup_index() == 1)
            warpgroup_reg_dealloc<24>();
        else
            warpgroup_reg_alloc<240>();
        global_store(output<float>(params) + thread_index(), float(warpgroup_index()));
    }
};

// Advice to the compiler, which changes no address. For each thread: an address of its warp and one
// of its own, from the start of shared memory on.
struct Advice : Threads<64> {
    DEVICE static void run(const Params& params) {
        const SharedAddress start = shared_memory();
        const float x = global_load(input<float>(params) + thread_index());
        uint32_t* const row = output<uint32_t>(params) + 2 * thread_index();
        global_store(row, warp_uniform(start + warp_index() * 1024) - start);
        global_store(row + 1, known_after(x, start + thread_index() * 4) - start);
    }
};

// ---------------------------------------------------------------------------------------------
// Barriers. The output is 64 float32 in reverse.

struct Reverse : Threads<64> {
    static constexpr int kSharedBytes = 4 * kThreads;

    DEVICE static float value(const Params& params) {
        return global_load(input<float>(params) + thread_index());
    }
    DEVICE static void put(float value) {
        shared_store_float(shared_memory() + 4 * thread_index(), value);
    }
    // The value that another thread has stored.
    DEVICE static void store(const Params& params, int place, int other) {
        global_store(output<float>(params) + place, shared_load_float(shared_memory() + 4 * other));
    }
};

// Within each warp.
struct ReverseInWarp : Reverse {
    DEVICE static void run(const Params& params) {
        put(value(params));
        warp_barrier();
        store(params, thread_index(), thread_index() ^ 31);
    }
};

// One warp waits for the other, which only arrives; then the roles change.
struct ReverseByNamedBarriers : Reverse {
    DEVICE static void run(const Params& params) {
        const int warp = thread_index() / 32;
        put(value(params));
        if (warp == 0) {
            named_barrier_arrive(1, kThreads);
            named_barrier_sync(15, kThreads);
        } else {
            named_barrier_sync(1, kThreads);
            named_barrier_arrive(15, kThreads);
        }
        store(params, thread_index(), kThreads - 1 - thread_index());
    }
};

// Three times, through an mbarrier whose phases change: 3 x 64, the first, twice and three times x.
struct ReverseByMbarriers : Reverse {
    static constexpr int kSharedBytes = Reverse::kSharedBytes + 16;

    DEVICE static void run(const Params& params) {
        const SharedAddress full = shared_memory() + Reverse::kSharedBytes, empty = full + 8;
        if (thread_index() == 0) {
            mbarrier_init(full, kThreads);
            mbarrier_init(empty, kThreads);
            fence_mbarrier_init();
        }
        block_barrier();
        for (int round = 0; round < 3; ++round) {
            put((round + 1) * value(params));
            mbarrier_arrive(full);
            mbarrier_wait(full, round & 1);
            store(params, round * kThreads + thread_index(), kThreads - 1 - thread_index());
            mbarrier_arrive(empty);
            mbarrier_wait(empty, round & 1);
        }
    }
};

// ---------------------------------------------------------------------------------------------
// Atomic additions to global memory

// Each of 8 x 128 numbers is added to one of 128, four at a time by a thread; and the first of each
// four to one of 32 more.
struct AddToGlobal : Threads<256> {
    DEVICE static void run(const Params& params) {
        const int lane = thread_index() % 32;
        const auto four = global_load(input<Words4>(params) + thread_index());
        float x[4];
        memcpy(x, &four, sizeof x);
        global_add4(output<float>(params) + 4 * lane, x);
        global_add(output<float>(params) + 128 + lane, x[0]);
    }
};

// ---------------------------------------------------------------------------------------------
// TMA

// For each of seqlen_k boxes of q, which start at the (column, row, head, batch) in seqused_k: the
// bytes of a panel of 24 rows in shared memory.
struct LoadBoxes : Threads<128> {
    static constexpr int kRowBox = 24;
    using Panel = Tile<kRowBox, kPanelColumns>;
    static constexpr int kSharedBytes = Panel::kBytes + 8;

    DEVICE static void run(const Params& params) {
        const SharedAddress full = shared_memory() + Panel::kBytes;
        if (thread_index() == 0) {
            prefetch_map(params.maps.q);
            mbarrier_init(full, 1);
            fence_mbarrier_init();
        }
        block_barrier();
        for (int box = 0; box < params.attention.seqlen_k; ++box) {
            const int32_t* const start = params.attention.seqused_k + 4 * box;
            if (thread_index() == 0) {
                mbarrier_arrive_expect(full, Panel::kBytes);
                tma_load_4d(shared_memory(), params.maps.q, full, global_load(start),
                            global_load(start + 1), global_load(start + 2), global_load(start + 3));
            }
            mbarrier_wait(full, box & 1);
            for (int i = thread_index(); i < Panel::kBytes / 16; i += kThreads)
                global_store(output<Words4>(params) + box * Panel::kBytes / 16 + i,
                             shared_load_words4(shared_memory() + 16 * i));
            fence_proxy_async();
            block_barrier();
        }
    }
};

// ---------------------------------------------------------------------------------------------
// Matrices

// From the 32 lanes' registers of four matrices, one below another, to 32 x 8 elements.
struct StoreMatrices : Threads<32> {
    static constexpr int kSharedBytes = 32 * 16;

    DEVICE static void run(const Params& params) {
        const SharedAddress row = shared_memory() + 16 * thread_index();
        store_matrices(row, global_load(input<Words4>(params) + thread_index()));
        block_barrier();
        global_store(output<Words4>(params) + thread_index(), shared_load_words4(row));
    }
};

// A B (64 x N, float32) in steps of 16. A is in q, B in v: 64 x kDepth and N x kDepth if the
// columns are the summed index, kDepth x 64 and kDepth x N if the rows are. Each panel of B is kGap
// bytes behind the one before.
template <class Element, int N, Major kMajorA, Major kMajorB, bool kFromRegisters, int kDepth = 32,
          int kGap = 0>
struct Product : Threads<128> {
    static constexpr int kSteps = kDepth / 16;
    static constexpr int kRowBox = kMajorA == Major::contraction ? 64 : kDepth;
    static constexpr int kKeyBox = kMajorB == Major::contraction ? N : kDepth;
    using Left = Tile<kRowBox, kMajorA == Major::contraction ? kDepth : 64>;
    using Right = Tile<kKeyBox, kMajorB == Major::contraction ? kDepth : N>;
    static constexpr int kToNextPanel = Right::kPanelBytes + kGap;
    static constexpr int kRightBytes = (Right::kPanels - 1) * kToNextPanel + Right::kPanelBytes;
    static constexpr int kSharedBytes = Left::kBytes + kRightBytes + 8;
    static_assert(kSharedBytes <= kMaxSharedBytes);

    DEVICE static void run(const Params& params) {
        const Left left{shared_memory()};
        const Right right{left.base + Left::kBytes};
        load(params, left, right);

        Accumulator<N> product;
        Packed<Element, kDepth> rows;
        if constexpr (kFromRegisters) {
            const int row = warp_index() * 16 + lane_index() % 16;
            for (int step = 0; step < kSteps; ++step) {
                const Words4 words = load_matrices(left.chunk(row, 2 * step + lane_index() / 16));
                for (int i = 0; i < 4; ++i) rows.word[step][i] = words.word[i];
            }
            warpgroup_fence_operand(rows.word);
        }
        warpgroup_fence_operand(product.value);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            const uint64_t b = kMajorB == Major::contraction ? right.columns(0, step)
                                                             : right.rows(step, kToNextPanel);
            if constexpr (kFromRegisters) {
                wgmma<Element, kMajorB>(product.value, rows.word[step], b, step > 0);
            } else {
                const uint64_t a =
                    kMajorA == Major::contraction ? left.columns(0, step) : left.rows(step);
                wgmma<Element, kMajorA, kMajorB>(product.value, a, b, step > 0);
            }
        }
        wgmma_commit();
        wgmma_wait<0>();
        warpgroup_fence_operand(product.value);
        for (int i = 0; i < product.kBlocks; ++i)
            for (int half = 0; half < 2; ++half)
                for (int side = 0; side < 2; ++side) {
                    const int row = warp_index() * 16 + row_in_warp(half);
                    global_store(output<float>(params) + row * N + column_of(i, side),
                                 product.at(i, half, side));
                }
    }

private:
    DEVICE static void load(const Params& params, const Left& left, const Right& right) {
        const SharedAddress full = right.base + kRightBytes;
        if (thread_index() == 0) {
            mbarrier_init(full, 1);
            fence_mbarrier_init();
            mbarrier_arrive_expect(full, Left::kBytes + Right::kBytes);
            for (int panel = 0; panel < Left::kPanels; ++panel)
                tma_load_4d(left.base + panel * Left::kPanelBytes, params.maps.q, full,
                            panel * kPanelColumns, 0, 0, 0);
            for (int panel = 0; panel < Right::kPanels; ++panel)
                tma_load_4d(right.base + panel * kToNextPanel, params.maps.v, full,
                            panel * kPanelColumns, 0, 0, 0);
        }
        block_barrier();
        mbarrier_wait(full, 0);
    }
};

}  // namespace jvp_attn::sm90
