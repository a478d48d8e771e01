// From a kernel class to a `Kernel` that launches it.
//
// A kernel class K has
//     kThreads, kSharedBytes  of a block
//     blocks(params)          the number of blocks of the grid
//     run(params)             the body of the kernel
#pragma once

#include <cstdint>
#include <limits>
#include <string>

#include "common/ptx.cuh"
#include "kernel.h"

namespace jvp_attn {

template <class K>
__global__ void __launch_bounds__(K::kThreads)
    run_kernel(const __grid_constant__ AttentionParams params) {
    K::run(params);
}

template <class K>
std::string launch(const AttentionParams& params, void* stream) {
    const int64_t blocks = K::blocks(params);
    if (blocks == 0) return "";
    if (blocks > std::numeric_limits<int32_t>::max())
        return "it needs " + std::to_string(blocks) + " blocks, more than a grid can have";
    return launch_kernel(run_kernel<K>, static_cast<int>(blocks), K::kThreads, K::kSharedBytes,
                         stream, params);
}

}  // namespace jvp_attn

// Defines the Kernel called NAME. The other arguments are its class.
#define JVP_ATTN_KERNEL(NAME, ...)                                                \
    namespace jvp_attn {                                                          \
    extern const Kernel NAME;                                                     \
    const Kernel NAME = {#NAME, __VA_ARGS__::kThreads, __VA_ARGS__::kSharedBytes, \
                         launch<__VA_ARGS__>};                                    \
    }
