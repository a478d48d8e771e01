// One function for each machine instruction, for compute capability 8.0 and newer.
//
// All PTX and CUDA builtins are in this file, sm90/ptx.cuh and sm90/wgmma.cuh. Compiled with
// JVP_ATTN_EMULATOR, the same functions come from an emulator and the kernels run on a CPU.
#pragma once

#include <cmath>
#include <cstdint>

namespace jvp_attn {

// The two element types. A 32-bit word holds two values, the lower column in the low half.
struct Bf16 {};
struct Fp16 {};

struct alignas(16) Words4 {
    uint32_t word[4];
};

// A byte address in the shared memory of the block.
using SharedAddress = uint32_t;

}  // namespace jvp_attn

#ifdef JVP_ATTN_EMULATOR
#include "emulated_ptx.h"
#else

#include <cuda_runtime.h>

#include <string>

#define DEVICE __device__ __forceinline__

namespace jvp_attn {

// ---------------------------------------------------------------------------------------------
// Thread indices and barriers

DEVICE int thread_index() { return threadIdx.x; }

DEVICE int block_index() { return blockIdx.x; }

// Waits for all threads of the block, whose writes to shared memory are visible to all afterwards.
// Unlike __syncthreads, different warps may wait in different statements.
DEVICE void block_barrier() { asm volatile("bar.sync 0;" ::: "memory"); }

// A barrier; returns whether the condition holds for any thread of the block.
DEVICE bool block_any(bool condition) { return __syncthreads_or(condition); }

DEVICE bool warp_any(bool condition) { return __any_sync(0xffffffff, condition); }

// The value of lane `lane_index() ^ mask`.
DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffff, value, mask); }

// ---------------------------------------------------------------------------------------------
// Memory

// The block's dynamic shared memory; its start is a multiple of 1024 bytes.
DEVICE SharedAddress shared_memory() {
    extern __shared__ __align__(1024) uint8_t jvp_attn_shared_memory[];
    return static_cast<SharedAddress>(__cvta_generic_to_shared(jvp_attn_shared_memory));
}

DEVICE float shared_load_float(SharedAddress address) {
    float value;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
    return value;
}

DEVICE void shared_store_float(SharedAddress address, float value) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}

DEVICE Words4 shared_load_words4(SharedAddress address) {
    Words4 x;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.word[0]), "=r"(x.word[1]), "=r"(x.word[2]), "=r"(x.word[3])
                 : "r"(address)
                 : "memory");
    return x;
}

DEVICE void shared_store_words4(SharedAddress address, const Words4& x) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x.word[0]),
                 "r"(x.word[1]), "r"(x.word[2]), "r"(x.word[3])
                 : "memory");
}

// Value is any plain type that the address is aligned for.
template <class Value>
DEVICE Value global_load(const Value* address) {
    return *address;
}

template <class Value>
DEVICE void global_store(Value* address, Value value) {
    *address = value;
}

// Copies `bytes` of 16 bytes from global to shared memory asynchronously and zero-fills the rest.
// Both addresses are multiples of 16; with 0 bytes the source is not read.
DEVICE void copy_async(SharedAddress target, const void* source, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source),
                 "r"(bytes)
                 : "memory");
}

// Closes a group of this thread's copies, which may be empty.
DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `Pending` of this thread's latest groups are still in flight.
template <int Pending>
DEVICE void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// ---------------------------------------------------------------------------------------------
// Matrices. With g = lane / 4 and t = lane % 4, a word of a thread holds the elements (g, 2t) and
// (g, 2t + 1) of an 8 x 8 matrix.

// Loads four 8 x 8 matrices; lane 8i + j gives the address of row j of matrix i.
DEVICE Words4 load_matrices(SharedAddress row) {
    Words4 x;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.word[0]), "=r"(x.word[1]), "=r"(x.word[2]), "=r"(x.word[3])
                 : "r"(row)
                 : "memory");
    return x;
}

// The same with each matrix transposed.
DEVICE Words4 load_matrices_transposed(SharedAddress row) {
    Words4 x;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.word[0]), "=r"(x.word[1]), "=r"(x.word[2]), "=r"(x.word[3])
                 : "r"(row)
                 : "memory");
    return x;
}

// accumulator (16 x 8) += A (16 x 16) B (16 x 8).
// a: the quarters (0, 0), (8, 0), (0, 8), (8, 8) of A; b0, b1: the halves of B, transposed;
// accumulator: of a thread (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
template <class Element>
DEVICE void multiply_add(float (&accumulator)[4], const Words4& a, uint32_t b0, uint32_t b1);

template <>
DEVICE void multiply_add<Bf16>(float (&accumulator)[4], const Words4& a, uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(accumulator[0]), "+f"(accumulator[1]), "+f"(accumulator[2]), "+f"(accumulator[3])
        : "r"(a.word[0]), "r"(a.word[1]), "r"(a.word[2]), "r"(a.word[3]), "r"(b0), "r"(b1));
}

template <>
DEVICE void multiply_add<Fp16>(float (&accumulator)[4], const Words4& a, uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(accumulator[0]), "+f"(accumulator[1]), "+f"(accumulator[2]), "+f"(accumulator[3])
        : "r"(a.word[0]), "r"(a.word[1]), "r"(a.word[2]), "r"(a.word[3]), "r"(b0), "r"(b1));
}

// ---------------------------------------------------------------------------------------------
// Arithmetic

// 2^x within 2 ulp; a result below 2^-126 is 0.
DEVICE float fast_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// a / b within 2 ulp, where |b| is 2^-126 to 2^126. A loop may lack the registers of an exact
// division, which has a slow path. (PTX: div.approx)
DEVICE float fast_divide(float a, float b) {
    float y;
    asm("div.approx.ftz.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
}

// The product, rounded to float32. The compiler never fuses it with an addition.
DEVICE float multiply_rn(float a, float b) { return __fmul_rn(a, b); }

// Rounds two float32 to the nearest elements.
template <class Element>
DEVICE uint32_t pack(float low, float high);

template <>
DEVICE uint32_t pack<Bf16>(float low, float high) {
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}

template <>
DEVICE uint32_t pack<Fp16>(float low, float high) {
    uint32_t word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}

template <class Element>
DEVICE float unpack_low(uint32_t word);

template <class Element>
DEVICE float unpack_high(uint32_t word);

template <>
DEVICE float unpack_low<Bf16>(uint32_t word) {
    return __uint_as_float(word << 16);
}

template <>
DEVICE float unpack_high<Bf16>(uint32_t word) {
    return __uint_as_float(word & 0xffff0000);
}

template <>
DEVICE float unpack_low<Fp16>(uint32_t word) {
    float value;
    asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, low;}"
        : "=f"(value)
        : "r"(word));
    return value;
}

template <>
DEVICE float unpack_high<Fp16>(uint32_t word) {
    float value;
    asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, high;}"
        : "=f"(value)
        : "r"(word));
    return value;
}

// Hides a value from the compiler, which then computes expressions of it here instead of before a
// loop, where they would occupy registers.
DEVICE int opaque(int value) {
    asm volatile("" : "+r"(value));
    return value;
}

// ---------------------------------------------------------------------------------------------
// Launching

// Enqueues a kernel that takes Params by value. Returns an error, empty if none.
template <class Params>
std::string launch_kernel(void (*kernel)(Params), int blocks, int threads, std::size_t shared_bytes,
                          void* stream, const Params& params) {
    const void* function = reinterpret_cast<const void*>(kernel);
    // A kernel needs this call for more than 48 KiB.
    cudaError_t status = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                              static_cast<int>(shared_bytes));
    if (status == cudaSuccess) {
        void* arguments[] = {const_cast<Params*>(&params)};
        status = cudaLaunchKernel(function, dim3(blocks), dim3(threads), arguments, shared_bytes,
                                  static_cast<cudaStream_t>(stream));
    }
    if (status == cudaSuccess) return "";
    cudaGetLastError();  // clear the error, or the next caller would see it again
    return cudaGetErrorString(status);
}

}  // namespace jvp_attn

#endif  // JVP_ATTN_EMULATOR
