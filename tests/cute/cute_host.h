// CuTe, the layout library of NVIDIA's CUTLASS, compiled for the CPU: its layouts are plain
// functions. This header is precompiled, so it is the first of a program.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>

// Stands for the shared memory of a block: as large as a matrix descriptor reaches, and aligned to
// its size, so that the swizzles of CuTe's pointers see the address bits of a GPU.
constexpr std::size_t kWitnessSharedBytes = std::size_t{1} << 18;
inline std::uint8_t* const witness_shared_memory =
    static_cast<std::uint8_t*>(std::aligned_alloc(kWitnessSharedBytes, kWitnessSharedBytes));

// CuTe asks for this builtin of nvcc's to turn pointers into shared memory into addresses there.
#define CUTE_CVTA_GENERIC_TO_SHARED_ACTIVATED 1
inline std::size_t __cvta_generic_to_shared(const void* pointer) {
    return static_cast<const std::uint8_t*>(pointer) - witness_shared_memory;
}

#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED  // wgmma with every number of columns

#include <cute/tensor.hpp>
// In this order: the others need tensor.hpp.
#include <cute/arch/mma_sm90.hpp>
#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/copy_traits_sm90.hpp>
#include <cute/atom/copy_traits_sm90_tma.hpp>
#include <cute/atom/mma_atom.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
