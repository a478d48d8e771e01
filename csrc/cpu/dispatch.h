// The attention kernels, compiled for several instruction sets, and the choice among these.
#pragma once

#include <vector>

#include "cpu/params.h"

namespace jvp_attn::cpu {

using Kernel = void (*)(const AttentionParams&);

// The kernels of one instruction set.
struct Kernels {
    const char* instruction_set;
    Kernel forward;   // the JVP as well, if `tout` is present
    Kernel backward;  // the VJP; of the forward JVP, if `tout` is present
};

#if defined(__x86_64__)
extern const Kernels kAvx512Kernels, kAvx2Kernels;
#endif
extern const Kernels kBaselineKernels;

// Those whose instruction set this machine has, the fastest first.
std::vector<const Kernels*> supported_kernels();

}  // namespace jvp_attn::cpu
