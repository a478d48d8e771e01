// The kernels for every machine of an architecture: SSE2 on x86-64, NEON on Arm.
#include "cpu/isa_independent.h"

#define JVP_ATTN_ISA baseline
#define JVP_ATTN_VECTOR_BYTES 16
#include "cpu/isa_kernels.h"

namespace jvp_attn::cpu {

const Kernels kBaselineKernels{"baseline", &baseline::forward, &baseline::backward};

}  // namespace jvp_attn::cpu
