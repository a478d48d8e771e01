// What a warpgroup's product (wgmma) reads in shared memory, and what it computes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "report.h"
#include "shared_memory.h"
#include "sm90/ptx.cuh"

namespace jvp_attn::emulator {

// accumulator (64 x columns) = A (64 x 16) B (16 x columns), plus accumulator if `accumulate`.
struct Product {
    static constexpr int kRows = 64;
    static constexpr int kDepth = 16;

    int columns;
    float (*widen)(uint16_t);  // an element
    bool a_in_registers;
    Major major_a, major_b;
    uint64_t a, b;  // descriptors; a is 0 if it is in registers
    bool accumulate;

    bool operator==(const Product&) const = default;
};

// Where the 8 elements of each chunk of a factor are, that have the same index but in the direction
// that is contiguous: chunk j of row (or, if that is the contiguous direction, of column) i has the
// number i * chunks in that direction + j. `extent` is the length of the index that is not summed.
std::vector<SharedAddress> chunks_of_factor(const Actor& actor, uint64_t descriptor, Major major,
                                            int extent);

// What each of the 128 threads brings: its registers of the accumulator, and of A if it is there.
struct ProductThread {
    float* accumulator;
    const uint32_t* a;
};

// Given the chunks of A, if it is in shared memory, and of B.
void perform(const Product& product, std::span<const SharedAddress> a,
             std::span<const SharedAddress> b, std::span<const ProductThread> threads,
             const SharedMemory& shared);

}  // namespace jvp_attn::emulator
