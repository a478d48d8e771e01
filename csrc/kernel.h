// A compiled kernel as plain data: its name, its resources and its launch function.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "params.h"

namespace jvp_attn {

struct Kernel {
    const char* name;  // as in jvp_attn/backends/kernel_table.py
    int threads;       // per block
    std::size_t shared_bytes;
    // Enqueues the kernel on a CUDA stream of the current device. Returns an error, empty if none.
    std::string (*launch)(const AttentionParams& params, void* stream);
};

// Every kernel of this build, listed in a source that csrc/generate.py writes.
const std::vector<Kernel>& all_kernels();

}  // namespace jvp_attn
