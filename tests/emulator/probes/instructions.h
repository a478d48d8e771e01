// Kernels of one instruction each, from an array in params.q to an array in params.out.
#pragma once

#include "sm80/launch.cuh"

namespace jvp_attn {

template <class Value>
DEVICE const Value* input(const AttentionParams& p) {
    return static_cast<const Value*>(p.q.data);
}

template <class Value>
DEVICE Value* output(const AttentionParams& p) {
    return static_cast<Value*>(p.out.data);
}

struct OneWarp {
    static constexpr int kThreads = 32;
    static constexpr int kSharedBytes = 0;
    static int64_t blocks(const AttentionParams&) { return 1; }
};

struct TwoWarps : OneWarp {
    static constexpr int kThreads = 64;
};

// From seqlen_q float32 to as many elements.
template <class Element>
struct Pack : OneWarp {
    DEVICE static void run(const AttentionParams& p) {
        for (int i = thread_index(); i < p.seqlen_q / 2; i += kThreads) {
            const float low = global_load(input<float>(p) + 2 * i);
            const float high = global_load(input<float>(p) + 2 * i + 1);
            global_store(output<uint32_t>(p) + i, pack<Element>(low, high));
        }
    }
};

// From seqlen_q elements to as many float32.
template <class Element>
struct Unpack : OneWarp {
    DEVICE static void run(const AttentionParams& p) {
        for (int i = thread_index(); i < p.seqlen_q / 2; i += kThreads) {
            const uint32_t word = global_load(input<uint32_t>(p) + i);
            global_store(output<float>(p) + 2 * i, unpack_low<Element>(word));
            global_store(output<float>(p) + 2 * i + 1, unpack_high<Element>(word));
        }
    }
};

struct FastExp2 : OneWarp {
    DEVICE static void run(const AttentionParams& p) {
        for (int i = thread_index(); i < p.seqlen_q; i += kThreads)
            global_store(output<float>(p) + i, fast_exp2(global_load(input<float>(p) + i)));
    }
};

// From 32 float32, one for each lane, to 32 x 32: a row for each mask.
struct ShuffleXor : OneWarp {
    DEVICE static void run(const AttentionParams& p) {
        const float value = global_load(input<float>(p) + thread_index());
        for (int mask = 0; mask < 32; ++mask)
            global_store(output<float>(p) + 32 * mask + thread_index(), shuffle_xor(value, mask));
    }
};

// From seqlen_q x 64 float32, not 0 where a condition holds for a thread, to 2 x seqlen_q x 64: the
// results of warp_any and of block_any in each thread.
struct Any : TwoWarps {
    DEVICE static void run(const AttentionParams& p) {
        for (int row = 0; row < p.seqlen_q; ++row) {
            const int place = row * kThreads + thread_index();
            const bool condition = global_load(input<float>(p) + place) != 0;
            global_store(output<float>(p) + place, float(warp_any(condition)));
            global_store(output<float>(p) + p.seqlen_q * kThreads + place,
                         float(block_any(condition)));
        }
    }
};

// Thread i copies the first i of 16 bytes, for i from 0 to 16: from 17 x 16 bytes to as many.
struct CopyAsync : OneWarp {
    static constexpr int kSharedBytes = 17 * 16;

    DEVICE static void run(const AttentionParams& p) {
        const int i = thread_index();
        if (i > 16) return;
        const SharedAddress target = shared_memory() + 16 * i;
        copy_async(target, input<Words4>(p) + i, i);
        copy_async_commit();
        copy_async_wait<0>();
        global_store(output<Words4>(p) + i, shared_load_words4(target));
    }
};

// From 32 x 8 elements, four matrices below one another, to the 32 lanes' registers.
template <bool kTransposed>
struct LoadMatrices : OneWarp {
    static constexpr int kSharedBytes = 32 * 16;

    DEVICE static void run(const AttentionParams& p) {
        const SharedAddress row = shared_memory() + 16 * thread_index();
        shared_store_words4(row, global_load(input<Words4>(p) + thread_index()));
        block_barrier();
        global_store(output<Words4>(p) + thread_index(),
                     kTransposed ? load_matrices_transposed(row) : load_matrices(row));
    }
};

// From A (16 x 16), B (16 x 8) and float32 C (16 x 8), one after another, to A B + C (16 x 8).
template <class Element>
struct MultiplyAdd : OneWarp {
    DEVICE static void run(const AttentionParams& p) {
        const auto a = [&](int row, int column) {
            return global_load(input<uint16_t>(p) + 16 * row + column);
        };
        const auto b = [&](int row, int column) {
            return global_load(input<uint16_t>(p) + 16 * 16 + 8 * row + column);
        };
        const auto word = [](uint16_t low, uint16_t high) { return low | uint32_t{high} << 16; };

        const int g = thread_index() / 4, t = thread_index() % 4;
        Words4 left;
        uint32_t right[2];
        for (int i = 0; i < 4; ++i) {
            const int row = g + i % 2 * 8, column = 2 * t + i / 2 * 8;
            left.word[i] = word(a(row, column), a(row, column + 1));
        }
        for (int i = 0; i < 2; ++i) right[i] = word(b(2 * t + 8 * i, g), b(2 * t + 1 + 8 * i, g));

        const auto* c = reinterpret_cast<const float*>(input<uint16_t>(p) + 16 * 16 + 16 * 8);
        const auto place = [&](int i) { return 8 * (g + i / 2 * 8) + 2 * t + i % 2; };
        float accumulator[4];
        for (int i = 0; i < 4; ++i) accumulator[i] = global_load(c + place(i));
        multiply_add<Element>(accumulator, left, right[0], right[1]);
        for (int i = 0; i < 4; ++i) global_store(output<float>(p) + place(i), accumulator[i]);
    }
};

}  // namespace jvp_attn
