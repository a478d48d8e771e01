// The attention maps, compiled for several instruction sets.
#pragma once

#include <string>
#include <vector>

#include "cpu/params.h"

namespace jvp_attn::cpu {

using Map = void (*)(const AttentionParams&);

struct Maps {
    const char* instruction_set;
    Map forward;   // and its tangent, where `tout` is there
    Map backward;  // of both
};

#if defined(__x86_64__)
extern const Maps kAvx512Maps, kAvx2Maps;
#endif
extern const Maps kBaselineMaps;

// Those that this machine can run, the fastest first.
std::vector<const Maps*> maps_that_run_here();

}  // namespace jvp_attn::cpu
