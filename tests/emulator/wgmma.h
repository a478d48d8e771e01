// The matrix product of a warpgroup (wgmma): the shared memory that it reads, and its result.
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
struct WgmmaOp {
    static constexpr int kRows = 64;
    static constexpr int kDepth = 16;

    int columns;
    float (*widen)(uint16_t);  // converts an element to float32
    bool a_in_registers;
    Major major_a, major_b;
    uint64_t a, b;  // descriptors; a is 0 if it is in registers
    bool accumulate;

    bool operator==(const WgmmaOp&) const = default;
};

// The addresses of the chunks of an operand, each of 8 elements that are contiguous. Chunk j of
// line i is number i * (chunks in a line) + j. `extent` is the length of the index that is not
// summed.
std::vector<SharedAddress> operand_chunks(const Actor& actor, uint64_t descriptor, Major major,
                                          int extent);

// The registers of one of the 128 threads: its part of the accumulator, and of A if in registers.
struct WgmmaThread {
    float* accumulator;
    const uint32_t* a;
};

// a and b are the chunks of A, if it is in shared memory, and of B.
void perform(const WgmmaOp& product, std::span<const SharedAddress> a,
             std::span<const SharedAddress> b, std::span<const WgmmaThread> threads,
             const SharedMemory& shared);

}  // namespace jvp_attn::emulator
