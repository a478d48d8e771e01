// Kernels that test the instructions of csrc/common/ptx.cuh that need others: thread indices,
// barriers and shared memory. Kernels of one instruction each are in
// tests/emulator/probes/instructions.h. All compute an array in params.out from one in params.q.
#pragma once

#include "probes/instructions.h"

namespace jvp_attn {

// For each thread of `batch` blocks: its index, its block's, and the lowest bits of the address
// where shared memory starts.
struct Indices : TwoWarps {
    static constexpr int kSharedBytes = 128;

    static int64_t blocks(const AttentionParams& p) { return p.batch; }

    DEVICE static void run(const AttentionParams& p) {
        uint32_t* const row = output<uint32_t>(p) + 3 * (block_index() * kThreads + thread_index());
        global_store(row, static_cast<uint32_t>(thread_index()));
        global_store(row + 1, static_cast<uint32_t>(block_index()));
        global_store(row + 2, shared_memory() % 128);
    }
};

// The 64 float32 of the threads, in reverse.
struct ReverseFloats : TwoWarps {
    static constexpr int kSharedBytes = 4 * kThreads;

    DEVICE static void run(const AttentionParams& p) {
        const int i = thread_index();
        shared_store_float(shared_memory() + 4 * i, global_load(input<float>(p) + i));
        block_barrier();
        const int other = kThreads - 1 - i;
        global_store(output<float>(p) + i, shared_load_float(shared_memory() + 4 * other));
    }
};

// The same with 16 bytes for each thread.
struct ReverseWords : TwoWarps {
    static constexpr int kSharedBytes = 16 * kThreads;

    DEVICE static void run(const AttentionParams& p) {
        const int i = thread_index();
        shared_store_words4(shared_memory() + 16 * i, global_load(input<Words4>(p) + i));
        block_barrier();
        const int other = kThreads - 1 - i;
        global_store(output<Words4>(p) + i, shared_load_words4(shared_memory() + 16 * other));
    }
};

// Three groups of copies, each read in reverse after its wait: 3 x 64 x 16 bytes.
struct CopyGroups : TwoWarps {
    static constexpr int kSharedBytes = 3 * 16 * kThreads;

    DEVICE static void run(const AttentionParams& p) {
        for (int group = 0; group < 3; ++group) {
            const int i = group * kThreads + thread_index();
            copy_async(shared_memory() + 16 * i, input<Words4>(p) + i, 16);
            copy_async_commit();
        }
        copy_async_wait<2>();
        store_reversed(p, 0);
        copy_async_wait<1>();
        store_reversed(p, 1);
        copy_async_wait<0>();
        store_reversed(p, 2);
    }

private:
    DEVICE static void store_reversed(const AttentionParams& p, int group) {
        block_barrier();
        const int other = group * kThreads + kThreads - 1 - thread_index();
        global_store(output<Words4>(p) + group * kThreads + thread_index(),
                     shared_load_words4(shared_memory() + 16 * other));
    }
};

// A copy of 0 bytes reads no source, and fills the target with 0.
struct CopyNothing : OneWarp {
    static constexpr int kSharedBytes = 16 * kThreads;

    DEVICE static void run(const AttentionParams& p) {
        const SharedAddress target = shared_memory() + 16 * thread_index();
        copy_async(target, nullptr, 0);
        copy_async_commit();
        copy_async_wait<0>();
        global_store(output<Words4>(p) + thread_index(), shared_load_words4(target));
    }
};

// seqlen_q numbers of 1 or 2 bytes, widened to words.
template <class Value>
struct Widen : OneWarp {
    DEVICE static void run(const AttentionParams& p) {
        for (int i = thread_index(); i < p.seqlen_q; i += kThreads)
            global_store(output<uint32_t>(p) + i, uint32_t{global_load(input<Value>(p) + i)});
    }
};

// seqlen_q elements, copied one by one.
struct CopyElements : OneWarp {
    DEVICE static void run(const AttentionParams& p) {
        for (int i = thread_index(); i < p.seqlen_q; i += kThreads)
            global_store(output<uint16_t>(p) + i, global_load(input<uint16_t>(p) + i));
    }
};

// From seqlen_q x 3 float32 to seqlen_q: a b − c.
struct MultiplyRn : OneWarp {
    DEVICE static void run(const AttentionParams& p) {
        for (int i = opaque(thread_index()); i < p.seqlen_q; i += kThreads) {
            const float* const x = input<float>(p) + 3 * i;
            const float product = multiply_rn(global_load(x), global_load(x + 1));
            global_store(output<float>(p) + i, product - global_load(x + 2));
        }
    }
};

// From seqlen_q x 2 float32 to seqlen_q: a / b.
struct FastDivide : OneWarp {
    DEVICE static void run(const AttentionParams& p) {
        for (int i = opaque(thread_index()); i < p.seqlen_q; i += kThreads) {
            const float* const x = input<float>(p) + 2 * i;
            global_store(output<float>(p) + i, fast_divide(global_load(x), global_load(x + 1)));
        }
    }
};

}  // namespace jvp_attn
