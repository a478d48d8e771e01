// wgmma: a warpgroup multiplies 64 x 16 by 16 x N elements asynchronously.
//
// The instruction lists all N / 2 registers of its accumulator, so each N that a kernel uses has a
// line at the end of this file.
#pragma once

#include <cstdint>
#include <type_traits>

#include "sm90/ptx.cuh"

// The registers of an accumulator of N columns in the instruction ...
#define JVP_ATTN_REGISTERS_8 "%0, %1, %2, %3"
#define JVP_ATTN_REGISTERS_16 JVP_ATTN_REGISTERS_8 ", %4, %5, %6, %7"
#define JVP_ATTN_REGISTERS_32 JVP_ATTN_REGISTERS_16 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define JVP_ATTN_REGISTERS_48 JVP_ATTN_REGISTERS_32 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define JVP_ATTN_REGISTERS_64 JVP_ATTN_REGISTERS_48 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define JVP_ATTN_REGISTERS_72 JVP_ATTN_REGISTERS_64 ", %32, %33, %34, %35"
#define JVP_ATTN_REGISTERS_80 JVP_ATTN_REGISTERS_64 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define JVP_ATTN_REGISTERS_96 JVP_ATTN_REGISTERS_80 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define JVP_ATTN_REGISTERS_112 JVP_ATTN_REGISTERS_96 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define JVP_ATTN_REGISTERS_128 JVP_ATTN_REGISTERS_112 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define JVP_ATTN_REGISTERS_144 JVP_ATTN_REGISTERS_128 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define JVP_ATTN_REGISTERS_160 JVP_ATTN_REGISTERS_144 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define JVP_ATTN_REGISTERS_176 JVP_ATTN_REGISTERS_160 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define JVP_ATTN_REGISTERS_192 JVP_ATTN_REGISTERS_176 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define JVP_ATTN_REGISTERS_208 JVP_ATTN_REGISTERS_192 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define JVP_ATTN_REGISTERS_224 \
    JVP_ATTN_REGISTERS_208 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define JVP_ATTN_REGISTERS_240 \
    JVP_ATTN_REGISTERS_224 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define JVP_ATTN_REGISTERS_256 \
    JVP_ATTN_REGISTERS_240 ", %120, %121, %122, %123, %124, %125, %126, %127"

// ... and as operands of the asm statement.
#define JVP_ATTN_OUTPUTS(BLOCK)                                                            \
    "+f"(accumulator[BLOCK][0]), "+f"(accumulator[BLOCK][1]), "+f"(accumulator[BLOCK][2]), \
        "+f"(accumulator[BLOCK][3])
#define JVP_ATTN_OUTPUTS_8 JVP_ATTN_OUTPUTS(0)
#define JVP_ATTN_OUTPUTS_16 JVP_ATTN_OUTPUTS(0), JVP_ATTN_OUTPUTS(1)
#define JVP_ATTN_OUTPUTS_32 JVP_ATTN_OUTPUTS_16, JVP_ATTN_OUTPUTS(2), JVP_ATTN_OUTPUTS(3)
#define JVP_ATTN_OUTPUTS_48 JVP_ATTN_OUTPUTS_32, JVP_ATTN_OUTPUTS(4), JVP_ATTN_OUTPUTS(5)
#define JVP_ATTN_OUTPUTS_64 JVP_ATTN_OUTPUTS_48, JVP_ATTN_OUTPUTS(6), JVP_ATTN_OUTPUTS(7)
#define JVP_ATTN_OUTPUTS_72 JVP_ATTN_OUTPUTS_64, JVP_ATTN_OUTPUTS(8)
#define JVP_ATTN_OUTPUTS_80 JVP_ATTN_OUTPUTS_64, JVP_ATTN_OUTPUTS(8), JVP_ATTN_OUTPUTS(9)
#define JVP_ATTN_OUTPUTS_96 JVP_ATTN_OUTPUTS_80, JVP_ATTN_OUTPUTS(10), JVP_ATTN_OUTPUTS(11)
#define JVP_ATTN_OUTPUTS_112 JVP_ATTN_OUTPUTS_96, JVP_ATTN_OUTPUTS(12), JVP_ATTN_OUTPUTS(13)
#define JVP_ATTN_OUTPUTS_128 JVP_ATTN_OUTPUTS_112, JVP_ATTN_OUTPUTS(14), JVP_ATTN_OUTPUTS(15)
#define JVP_ATTN_OUTPUTS_144 JVP_ATTN_OUTPUTS_128, JVP_ATTN_OUTPUTS(16), JVP_ATTN_OUTPUTS(17)
#define JVP_ATTN_OUTPUTS_160 JVP_ATTN_OUTPUTS_144, JVP_ATTN_OUTPUTS(18), JVP_ATTN_OUTPUTS(19)
#define JVP_ATTN_OUTPUTS_176 JVP_ATTN_OUTPUTS_160, JVP_ATTN_OUTPUTS(20), JVP_ATTN_OUTPUTS(21)
#define JVP_ATTN_OUTPUTS_192 JVP_ATTN_OUTPUTS_176, JVP_ATTN_OUTPUTS(22), JVP_ATTN_OUTPUTS(23)
#define JVP_ATTN_OUTPUTS_208 JVP_ATTN_OUTPUTS_192, JVP_ATTN_OUTPUTS(24), JVP_ATTN_OUTPUTS(25)
#define JVP_ATTN_OUTPUTS_224 JVP_ATTN_OUTPUTS_208, JVP_ATTN_OUTPUTS(26), JVP_ATTN_OUTPUTS(27)
#define JVP_ATTN_OUTPUTS_240 JVP_ATTN_OUTPUTS_224, JVP_ATTN_OUTPUTS(28), JVP_ATTN_OUTPUTS(29)
#define JVP_ATTN_OUTPUTS_256 JVP_ATTN_OUTPUTS_240, JVP_ATTN_OUTPUTS(30), JVP_ATTN_OUTPUTS(31)

// X0, X1, ... are the numbers of the operands after the accumulator.
#define JVP_ATTN_WGMMA_SHARED(TYPE, N, X0, X1, X2, X3, X4)                                     \
    asm volatile("{.reg .pred p; setp.ne.b32 p, %" #X2                                         \
                 ", 0; "                                                                       \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE               \
                 " {" JVP_ATTN_REGISTERS_##N "}, %" #X0 ", %" #X1 ", p, 1, 1, %" #X3 ", %" #X4 \
                                             ";}"                                              \
                 : JVP_ATTN_OUTPUTS_##N                                                        \
                 : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)),                          \
                   "n"(static_cast<int>(kMajorA)), "n"(static_cast<int>(kMajorB)))
#define JVP_ATTN_WGMMA_REGISTERS(TYPE, N, X0, X1, X2, X3, X4, X5, X6)                             \
    asm volatile("{.reg .pred p; setp.ne.b32 p, %" #X5                                            \
                 ", 0; "                                                                          \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE                  \
                 " {" JVP_ATTN_REGISTERS_##N "}, {%" #X0 ", %" #X1 ", %" #X2 ", %" #X3 "}, %" #X4 \
                                             ", p, 1, 1, %" #X6 ";}"                              \
                 : JVP_ATTN_OUTPUTS_##N                                                           \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),                            \
                   "r"(static_cast<int>(accumulate)), "n"(static_cast<int>(kMajorB)))

// accumulator (64 x N) = A (64 x 16) B (16 x N), plus accumulator if `accumulate`. Warp w of the
// warpgroup holds rows 16 w to 16 w + 15, each block of 8 columns in the layout of multiply_add.
// a: a descriptor of A in shared memory, or the warp's 16 rows in the layout of multiply_add;
// b: a descriptor of B. Registers and shared memory must not be accessed before wgmma_wait.
// (PTX: wgmma.mma_async)
#define JVP_ATTN_WGMMA(N, X0, X1, X2, X3, X4, X5, X6)                                            \
    template <class Element, Major kMajorA, Major kMajorB>                                       \
    DEVICE void wgmma(float (&accumulator)[N / 8][4], uint64_t a, uint64_t b, bool accumulate) { \
        if constexpr (std::is_same_v<Element, Bf16>)                                             \
            JVP_ATTN_WGMMA_SHARED("bf16", N, X0, X1, X2, X3, X4);                                \
        else                                                                                     \
            JVP_ATTN_WGMMA_SHARED("f16", N, X0, X1, X2, X3, X4);                                 \
    }                                                                                            \
    template <class Element, Major kMajorB>                                                      \
    DEVICE void wgmma(float (&accumulator)[N / 8][4], const uint32_t (&a)[4], uint64_t b,        \
                      bool accumulate) {                                                         \
        if constexpr (std::is_same_v<Element, Bf16>)                                             \
            JVP_ATTN_WGMMA_REGISTERS("bf16", N, X0, X1, X2, X3, X4, X5, X6);                     \
        else                                                                                     \
            JVP_ATTN_WGMMA_REGISTERS("f16", N, X0, X1, X2, X3, X4, X5, X6);                      \
    }

namespace jvp_attn {

JVP_ATTN_WGMMA(8, 4, 5, 6, 7, 8, 9, 10)
JVP_ATTN_WGMMA(48, 24, 25, 26, 27, 28, 29, 30)
JVP_ATTN_WGMMA(64, 32, 33, 34, 35, 36, 37, 38)
JVP_ATTN_WGMMA(72, 36, 37, 38, 39, 40, 41, 42)
JVP_ATTN_WGMMA(80, 40, 41, 42, 43, 44, 45, 46)
JVP_ATTN_WGMMA(96, 48, 49, 50, 51, 52, 53, 54)
JVP_ATTN_WGMMA(112, 56, 57, 58, 59, 60, 61, 62)
JVP_ATTN_WGMMA(128, 64, 65, 66, 67, 68, 69, 70)
JVP_ATTN_WGMMA(176, 88, 89, 90, 91, 92, 93, 94)
JVP_ATTN_WGMMA(256, 128, 129, 130, 131, 132, 133, 134)

}  // namespace jvp_attn
