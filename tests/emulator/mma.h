// The matrix instructions of a warp: ldmatrix and mma, on the registers of its 32 lanes.
//
// With g = lane / 4 and t = lane % 4, a lane's word of an 8 x 8 matrix holds (g, 2t) and (g, 2t+1).
#pragma once

#include <cstddef>
#include <span>

#include "common/ptx.cuh"

namespace jvp_attn::emulator {

struct LoadMatrices {
    const std::byte* row;  // lane 8i + j: row j of matrix i, 8 elements
    Words4 result;
};

struct MultiplyAdd {
    float* accumulator;
    const Words4* a;
    uint32_t b0, b1;
};

// The arguments point to the structs above, one for each lane.
void load_matrices_of_warp(std::span<void* const> arguments);
void load_matrices_transposed_of_warp(std::span<void* const> arguments);
void multiply_add_bf16_of_warp(std::span<void* const> arguments);
void multiply_add_fp16_of_warp(std::span<void* const> arguments);

}  // namespace jvp_attn::emulator
