// Which of the instruction sets this machine has.
#include "cpu/map.h"

namespace jvp_attn::cpu {

std::vector<const Maps*> maps_that_run_here() {
    std::vector<const Maps*> maps;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq"))
        maps.push_back(&kAvx512Maps);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c"))
        maps.push_back(&kAvx2Maps);
#endif
    maps.push_back(&kBaselineMaps);
    return maps;
}

}  // namespace jvp_attn::cpu
