// From a kernel class to a `Kernel` that launches it on compute capability 9.0.
//
// A kernel class K has
//     kThreads, kSharedBytes  of a block
//     kRowBox, kKeyBox        rows of a TMA box of queries and of keys
//     why_not(params)         why it cannot compute a problem; empty if it can
//     work(params)            the number of work tiles
//     run(params)             the body of the kernel
// The kernels are persistent: the grid has at most one block for each multiprocessor, and each
// block computes one work tile after the other (scheduler.cuh).
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>

#include "kernel.h"
#include "sm90/params.cuh"
#include "sm90/tensor_map.h"

namespace jvp_attn::sm90 {

// Its instructions compile for 9.0 alone. Compiled for another architecture the kernel is empty,
// and `launch` returns an error there.
template <class K>
__global__ void __launch_bounds__(K::kThreads, 1)
    run_kernel(const __grid_constant__ Params params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(JVP_ATTN_EMULATOR)
    K::run(params);
#endif
}

template <class K>
std::string launch(const AttentionParams& attention, void* stream) {
    const int64_t work = K::work(attention);
    if (work == 0) return "";
    if (work > std::numeric_limits<int32_t>::max() / 2)
        return "it needs " + std::to_string(work) + " work tiles, more than it can count";
    if (std::string error = K::why_not(attention); !error.empty()) return error;
    DeviceFacts device;
    if (std::string error = current_device(device); !error.empty()) return error;
    if (device.capability != 90)
        return "it is machine code for compute capability 9.0, and the device has " +
               std::to_string(device.capability / 10) + "." +
               std::to_string(device.capability % 10);

    Params params;
    params.attention = attention;
    params.work_tiles = static_cast<int32_t>(work);
    params.blocks = std::min(params.work_tiles, device.multiprocessors);
    if (std::string error = encode_tensor_maps(params, K::kRowBox, K::kKeyBox); !error.empty())
        return error;
    return launch_kernel(run_kernel<K>, params.blocks, K::kThreads, K::kSharedBytes, stream,
                         params);
}

}  // namespace jvp_attn::sm90

// Defines the Kernel called NAME. The other arguments are its class.
#define JVP_ATTN_KERNEL(NAME, ...)                                                \
    namespace jvp_attn {                                                          \
    extern const Kernel NAME;                                                     \
    const Kernel NAME = {#NAME, __VA_ARGS__::kThreads, __VA_ARGS__::kSharedBytes, \
                         sm90::launch<__VA_ARGS__>};                              \
    }
