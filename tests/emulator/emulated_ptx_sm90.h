// The instructions of csrc/sm90/ptx.cuh on a CPU: the same names, executed by the emulator.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <type_traits>

#include "current.h"
#include "emulated_ptx.h"
#include "half_types.h"
#include "tensor_map.h"

namespace jvp_attn {

namespace emulator {

// Defined in sm90_instructions.cpp.
void request_registers(const char* instruction, int registers, bool more, const Place& where);
void wgmma_wait(int pending, const Place& where);
void check_idle(const void* registers, const Place& where);
void wgmma(std::span<float> accumulator, float (*widen)(uint16_t), const uint32_t* a_registers,
           Major major_a, Major major_b, uint64_t a, uint64_t b, bool accumulate,
           const Place& where);

template <class Element>
constexpr float (*widen)(uint16_t) = std::is_same_v<Element, Bf16> ? &float_from_bf16
                                                                   : &float_from_fp16;

}  // namespace emulator

// ---------------------------------------------------------------------------------------------
// Warpgroups and their registers

inline int warpgroup_index() { return emulator::current.thread / kWarpgroupThreads; }

bool elect_one(emulator::Place where = emulator::Place::current());

template <int Registers>
void warpgroup_reg_alloc(emulator::Place where = emulator::Place::current()) {
    emulator::request_registers("warpgroup_reg_alloc", Registers, true, where);
}

template <int Registers>
void warpgroup_reg_dealloc(emulator::Place where = emulator::Place::current()) {
    emulator::request_registers("warpgroup_reg_dealloc", Registers, false, where);
}

// ---------------------------------------------------------------------------------------------
// Barriers and fences

void warp_barrier(emulator::Place where = emulator::Place::current());

void named_barrier_sync(int barrier, int threads,
                        emulator::Place where = emulator::Place::current());

void named_barrier_arrive(int barrier, int threads,
                          emulator::Place where = emulator::Place::current());

void mbarrier_init(SharedAddress barrier, int arrivals,
                   emulator::Place where = emulator::Place::current());

void fence_mbarrier_init();

void mbarrier_arrive(SharedAddress barrier, emulator::Place where = emulator::Place::current());

void mbarrier_arrive_expect(SharedAddress barrier, int bytes,
                            emulator::Place where = emulator::Place::current());

void mbarrier_wait(SharedAddress barrier, int phase,
                   emulator::Place where = emulator::Place::current());

void fence_proxy_async();

// ---------------------------------------------------------------------------------------------
// Atomic additions to global memory

void global_add(float* address, float x, emulator::Place where = emulator::Place::current());

void global_add4(float* address, const float (&x)[4],
                 emulator::Place where = emulator::Place::current());

// ---------------------------------------------------------------------------------------------
// TMA

void tma_load_4d(SharedAddress target, const TensorMap& map, SharedAddress barrier, int column,
                 int row, int head, int batch, emulator::Place where = emulator::Place::current());

inline void prefetch_map(const TensorMap&) {}

// ---------------------------------------------------------------------------------------------
// Matrices

void store_matrices(SharedAddress row, const Words4& x,
                    emulator::Place where = emulator::Place::current());

void wgmma_fence(emulator::Place where = emulator::Place::current());

void wgmma_commit(emulator::Place where = emulator::Place::current());

template <int Pending>
void wgmma_wait(emulator::Place where = emulator::Place::current()) {
    emulator::wgmma_wait(Pending, where);
}

template <class Element, Major kMajorA, Major kMajorB, std::size_t Blocks>
void wgmma(float (&accumulator)[Blocks][4], uint64_t a, uint64_t b, bool accumulate,
           emulator::Place where = emulator::Place::current()) {
    emulator::wgmma({accumulator[0], 4 * Blocks}, emulator::widen<Element>, nullptr, kMajorA,
                    kMajorB, a, b, accumulate, where);
}

template <class Element, Major kMajorB, std::size_t Blocks>
void wgmma(float (&accumulator)[Blocks][4], const uint32_t (&a)[4], uint64_t b, bool accumulate,
           emulator::Place where = emulator::Place::current()) {
    emulator::wgmma({accumulator[0], 4 * Blocks}, emulator::widen<Element>, a, Major::contraction,
                    kMajorB, 0, b, accumulate, where);
}

template <std::size_t Blocks>
void warpgroup_fence_operand(float (&registers)[Blocks][4],
                             emulator::Place where = emulator::Place::current()) {
    emulator::check_idle(registers, where);
}

template <std::size_t Steps>
void warpgroup_fence_operand(uint32_t (&registers)[Steps][4],
                             emulator::Place where = emulator::Place::current()) {
    for (auto& fragment : registers) emulator::check_idle(fragment, where);
}

// ---------------------------------------------------------------------------------------------
// Advice to the compiler

SharedAddress warp_uniform(SharedAddress address,
                           emulator::Place where = emulator::Place::current());

inline SharedAddress known_after(float, SharedAddress address) { return address; }

// ---------------------------------------------------------------------------------------------
// On the host

struct DeviceFacts {
    int capability = 0;
    int multiprocessors = 0;
};

std::string current_device(DeviceFacts& facts);

}  // namespace jvp_attn
