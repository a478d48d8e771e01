// The kernels for x86-64 with AVX-512.
#if defined(__x86_64__)

#include "cpu/isa_independent.h"

#if defined(__clang__)
#pragma clang attribute push(                                                                 \
    __attribute__((                                                                           \
        target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c,prefer-vector-width=512"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c,prefer-vector-width=512")
#endif
#define JVP_ATTN_ISA avx512
#define JVP_ATTN_VECTOR_BYTES 64
#include "cpu/isa_kernels.h"

namespace jvp_attn::cpu {

const Kernels kAvx512Kernels{"avx512", &avx512::forward, &avx512::backward};

}  // namespace jvp_attn::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
