// The compile gate includes this before a kernel's source. The file then holds only the kernel's
// machine code, and a variable one byte larger than the shared memory that its launch asks for:
// ptxas reports it as global memory.
#pragma once

#include "sm80/launch.cuh"

#undef JVP_ATTN_KERNEL
#define JVP_ATTN_KERNEL(NAME, ...)                                                             \
    namespace jvp_attn {                                                                       \
    template __global__ void run_kernel<__VA_ARGS__>(const __grid_constant__ AttentionParams); \
    __device__ char shared_memory_and_one_byte[__VA_ARGS__::kSharedBytes + 1];                 \
    }
