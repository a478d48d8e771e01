// As one_sm80_kernel.cuh, for the kernels of compute capability 9.0.
#pragma once

#include "sm90/launch.cuh"

#undef JVP_ATTN_KERNEL
#define JVP_ATTN_KERNEL(NAME, ...)                                                                \
    namespace jvp_attn {                                                                          \
    template __global__ void sm90::run_kernel<__VA_ARGS__>(const __grid_constant__ sm90::Params); \
    __device__ char shared_memory_and_one_byte[__VA_ARGS__::kSharedBytes + 1];                    \
    }
