// The kernels for x86-64 with AVX2 and FMA.
#if defined(__x86_64__)

#include "cpu/isa_independent.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define JVP_ATTN_ISA avx2
#define JVP_ATTN_VECTOR_BYTES 32
#include "cpu/isa_kernels.h"

namespace jvp_attn::cpu {

const Kernels kAvx2Kernels{"avx2", &avx2::forward, &avx2::backward};

}  // namespace jvp_attn::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
