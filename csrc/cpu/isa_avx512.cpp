// The maps for x86-64 with AVX-512.
#if defined(__x86_64__)

#include "cpu/shared_headers.h"

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
#include "cpu/maps.h"

namespace jvp_attn::cpu {

const Maps kAvx512Maps{"avx512", &avx512::forward, &avx512::backward};

}  // namespace jvp_attn::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
