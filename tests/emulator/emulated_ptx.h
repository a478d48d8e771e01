// The instructions of csrc/common/ptx.cuh on a CPU: the same names, executed by the emulator.
//
// An instruction that can break a rule also takes the line of the kernel, for the report.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <source_location>
#include <string>
#include <type_traits>

#include "current.h"
#include "half_types.h"
#include "in_flight.h"

#define DEVICE inline
#define __global__
#define __launch_bounds__(...)
#define __grid_constant__

namespace jvp_attn {

// CUDA defines them in the global namespace.
using std::max;
using std::min;

namespace emulator {

using Place = std::source_location;

// Defined in instructions.cpp, so that the kernels do not compile them.
void check_global_read(const void* address, std::size_t bytes, const Place& where);
void check_global_write(const void* address, std::size_t bytes, const Place& where);
void copy_async_wait(int pending);
void multiply_add_bf16(float (&accumulator)[4], const Words4& a, uint32_t b0, uint32_t b1,
                       const Place& where);
void multiply_add_fp16(float (&accumulator)[4], const Words4& a, uint32_t b0, uint32_t b1,
                       const Place& where);
std::string run(int blocks, int threads, std::size_t shared_bytes, int capability,
                std::function<void()> kernel);

}  // namespace emulator

// ---------------------------------------------------------------------------------------------
// Thread indices and collectives

inline int thread_index() { return emulator::current.thread; }

inline int block_index() { return emulator::current.block; }

void block_barrier(emulator::Place where = emulator::Place::current());

bool block_any(bool condition, emulator::Place where = emulator::Place::current());

bool warp_any(bool condition, emulator::Place where = emulator::Place::current());

float shuffle_xor(float value, int mask, emulator::Place where = emulator::Place::current());

// ---------------------------------------------------------------------------------------------
// Memory

SharedAddress shared_memory();

float shared_load_float(SharedAddress address, emulator::Place where = emulator::Place::current());

void shared_store_float(SharedAddress address, float value,
                        emulator::Place where = emulator::Place::current());

Words4 shared_load_words4(SharedAddress address,
                          emulator::Place where = emulator::Place::current());

void shared_store_words4(SharedAddress address, const Words4& x,
                         emulator::Place where = emulator::Place::current());

template <class Value>
Value global_load(const Value* address, emulator::Place where = emulator::Place::current()) {
    emulator::check_global_read(address, sizeof(Value), where);
    return *address;
}

template <class Value>
void global_store(Value* address, Value value, emulator::Place where = emulator::Place::current()) {
    if constexpr (std::is_same_v<Value, float>)
        emulator::check_not_in_flight(value, "global_store", where);
    emulator::check_global_write(address, sizeof(Value), where);
    *address = value;
}

void copy_async(SharedAddress target, const void* source, int bytes,
                emulator::Place where = emulator::Place::current());

void copy_async_commit();

template <int Pending>
void copy_async_wait() {
    emulator::copy_async_wait(Pending);
}

// ---------------------------------------------------------------------------------------------
// Matrices

Words4 load_matrices(SharedAddress row, emulator::Place where = emulator::Place::current());

Words4 load_matrices_transposed(SharedAddress row,
                                emulator::Place where = emulator::Place::current());

template <class Element>
void multiply_add(float (&accumulator)[4], const Words4& a, uint32_t b0, uint32_t b1,
                  emulator::Place where = emulator::Place::current());

template <>
inline void multiply_add<Bf16>(float (&accumulator)[4], const Words4& a, uint32_t b0, uint32_t b1,
                               emulator::Place where) {
    emulator::multiply_add_bf16(accumulator, a, b0, b1, where);
}

template <>
inline void multiply_add<Fp16>(float (&accumulator)[4], const Words4& a, uint32_t b0, uint32_t b1,
                               emulator::Place where) {
    emulator::multiply_add_fp16(accumulator, a, b0, b1, where);
}

// ---------------------------------------------------------------------------------------------
// Arithmetic

inline float fast_exp2(float x, emulator::Place where = emulator::Place::current()) {
    emulator::check_not_in_flight(x, "fast_exp2", where);
    const float y = std::exp2f(x);
    return y < std::numeric_limits<float>::min() ? 0 : y;
}

inline float fast_divide(float a, float b) { return a / b; }

// Compiled with -ffp-contract=off.
inline float multiply_rn(float a, float b) { return a * b; }

template <class Element>
uint32_t pack(float low, float high, emulator::Place where = emulator::Place::current());

template <>
inline uint32_t pack<Bf16>(float low, float high, emulator::Place where) {
    emulator::check_not_in_flight(low, "pack", where);
    emulator::check_not_in_flight(high, "pack", where);
    return emulator::bf16_from(low) | uint32_t{emulator::bf16_from(high)} << 16;
}

template <>
inline uint32_t pack<Fp16>(float low, float high, emulator::Place where) {
    emulator::check_not_in_flight(low, "pack", where);
    emulator::check_not_in_flight(high, "pack", where);
    return emulator::fp16_from(low) | uint32_t{emulator::fp16_from(high)} << 16;
}

template <class Element>
float unpack_low(uint32_t word);

template <class Element>
float unpack_high(uint32_t word);

template <>
inline float unpack_low<Bf16>(uint32_t word) {
    return emulator::float_from_bf16(word & 0xffff);
}

template <>
inline float unpack_high<Bf16>(uint32_t word) {
    return emulator::float_from_bf16(word >> 16);
}

template <>
inline float unpack_low<Fp16>(uint32_t word) {
    return emulator::float_from_fp16(word & 0xffff);
}

template <>
inline float unpack_high<Fp16>(uint32_t word) {
    return emulator::float_from_fp16(word >> 16);
}

inline int opaque(int value) { return value; }

// ---------------------------------------------------------------------------------------------
// Launching

// Runs the kernel before it returns; there are no streams.
template <class Params>
std::string launch_kernel(void (*kernel)(Params), int blocks, int threads, std::size_t shared_bytes,
                          void* /*stream*/, const Params& params) {
    int capability = 80;
    if constexpr (requires { Params::kCapability; }) capability = Params::kCapability;
    return emulator::run(blocks, threads, shared_bytes, capability, [&] { kernel(params); });
}

}  // namespace jvp_attn
