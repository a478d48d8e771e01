// The matrix instructions of csrc, recorded. The headers of the emulator declare them; the products
// themselves are performed by CuTe's layouts (products_sm80.h, products_sm90.h).
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

#include "cute_host.h"
// The emulator defines CUDA's keywords itself.
#undef __global__
#undef __grid_constant__
#include "common/fragment.cuh"
#include "sm90/ptx.cuh"

namespace jvp_attn::witness {

// An element type for positions in a matrix: integers, which bfloat16 would round.
struct Position {};

struct Wgmma {
    std::span<float> accumulator;
    float (*widen)(uint16_t);
    bool a_in_registers;
    std::array<uint32_t, 4> a_registers;
    Major major_a, major_b;
    uint64_t a, b;
    bool accumulate;
};

struct Mma {
    float* accumulator;
    Words4 a;
    uint32_t b[2];
};

struct StoredMatrices {
    SharedAddress row;
    Words4 words;
};

struct TmaLoad {
    SharedAddress target;
    int coordinates[4];  // column, row, head, batch
};

// What one thread has issued.
struct Recorded {
    std::vector<Wgmma> wgmmas;
    std::vector<Mma> mmas;
    std::vector<StoredMatrices> stores;
    std::vector<SharedAddress> loads;  // rows given to ldmatrix
    std::vector<TmaLoad> tma_loads;
};

// ldmatrix exchanges data between lanes, so code that uses it runs twice: first all lanes give
// their rows, then they get the elements.
enum class Pass { rows, elements };

inline Pass pass = Pass::elements;
inline std::array<Recorded, kWarpgroupThreads> recorded;
inline std::size_t next_load = 0;  // of the running thread, in the second pass

inline Recorded& recorded_now() { return recorded[emulator::current.thread]; }

// Calls `code` as each thread of a warpgroup; what they issue is in `recorded`.
template <class Code>
void as_warpgroup(const Code& code) {
    pass = Pass::elements;
    recorded = {};
    for (int thread = 0; thread < kWarpgroupThreads; ++thread) {
        emulator::current.thread = thread;
        code(thread);
    }
}

// The same for a warp, whose code may use ldmatrix.
template <class Code>
void as_warp(const Code& code) {
    recorded = {};
    for (const Pass each : {Pass::rows, Pass::elements}) {
        pass = each;
        for (int thread = 0; thread < 32; ++thread) {
            emulator::current.thread = thread;
            next_load = 0;
            code(thread);
        }
    }
}

inline uint16_t element_at(SharedAddress address) {
    uint16_t element;
    std::memcpy(&element, witness_shared_memory + address % kWitnessSharedBytes, sizeof element);
    return element;
}

// The words of ldmatrix: CuTe says which bit of which lane's row each of them is.
template <class Layout>
Words4 load_matrices_by(const Layout& bit_of) {
    if (pass == Pass::rows) return {};
    Words4 words = {};
    for (int bit = 0; bit < 128; bit += 16) {
        const int source = bit_of(emulator::current.thread, bit);
        const SharedAddress row = recorded[source / 128].loads.at(next_load);
        words.word[bit / 32] |= uint32_t{element_at(row + source % 128 / 8)} << bit % 32;
    }
    ++next_load;
    return words;
}

}  // namespace jvp_attn::witness

namespace jvp_attn {

template <>
inline uint32_t pack<witness::Position>(float low, float high, emulator::Place) {
    return static_cast<uint32_t>(low) | static_cast<uint32_t>(high) << 16;
}

template <>
inline float unpack_low<witness::Position>(uint32_t word) {
    return word & 0xffff;
}

template <>
inline float unpack_high<witness::Position>(uint32_t word) {
    return word >> 16;
}

inline Words4 load_matrices(SharedAddress row, emulator::Place) {
    if (witness::pass == witness::Pass::rows) witness::recorded_now().loads.push_back(row);
    return witness::load_matrices_by(cute::Copy_Traits<cute::SM75_U32x4_LDSM_N>::DstLayout{});
}

inline Words4 load_matrices_transposed(SharedAddress row, emulator::Place) {
    if (witness::pass == witness::Pass::rows) witness::recorded_now().loads.push_back(row);
    return witness::load_matrices_by(cute::Copy_Traits<cute::SM75_U16x8_LDSM_T>::DstLayout{});
}

inline void store_matrices(SharedAddress row, const Words4& x, emulator::Place) {
    if (witness::pass == witness::Pass::elements)
        witness::recorded_now().stores.push_back({row, x});
}

inline void tma_load_4d(SharedAddress target, const TensorMap&, SharedAddress, int column, int row,
                        int head, int batch, emulator::Place) {
    witness::recorded_now().tma_loads.push_back({target, {column, row, head, batch}});
}

namespace emulator {

inline void multiply_add_bf16(float (&accumulator)[4], const Words4& a, uint32_t b0, uint32_t b1,
                              const Place&) {
    if (witness::pass == witness::Pass::elements)
        witness::recorded_now().mmas.push_back({accumulator, a, {b0, b1}});
}

inline void wgmma(std::span<float> accumulator, float (*widen)(uint16_t),
                  const uint32_t* a_registers, Major major_a, Major major_b, uint64_t a, uint64_t b,
                  bool accumulate, const Place&) {
    witness::Wgmma x = {accumulator, widen,     a_registers != nullptr, {}, major_a, major_b, a,
                        b,           accumulate};
    if (a_registers) std::memcpy(x.a_registers.data(), a_registers, sizeof x.a_registers);
    witness::recorded_now().wgmmas.push_back(x);
}

// No register is in flight: products are performed after their thread has run.
[[noreturn]] inline void report_use_in_flight(const char*, const Place&) { std::abort(); }

}  // namespace emulator

}  // namespace jvp_attn
