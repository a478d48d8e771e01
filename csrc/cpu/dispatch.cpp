// Detects the instruction sets of this machine.
#include "cpu/dispatch.h"

namespace jvp_attn::cpu {

std::vector<const Kernels*> supported_kernels() {
    std::vector<const Kernels*> kernels;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq"))
        kernels.push_back(&kAvx512Kernels);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c"))
        kernels.push_back(&kAvx2Kernels);
#endif
    kernels.push_back(&kBaselineKernels);
    return kernels;
}

}  // namespace jvp_attn::cpu
