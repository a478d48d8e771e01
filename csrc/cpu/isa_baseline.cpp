// The maps for what every machine of this architecture has: SSE2 on x86-64, NEON on Arm.
#include "cpu/shared_headers.h"

#define JVP_ATTN_ISA baseline
#define JVP_ATTN_VECTOR_BYTES 16
#include "cpu/maps.h"

namespace jvp_attn::cpu {

const Maps kBaselineMaps{"baseline", &baseline::forward, &baseline::backward};

}  // namespace jvp_attn::cpu
