// One function for each machine instruction that compute capability 9.0 adds: named barriers,
// mbarriers, TMA, setmaxnreg. wgmma.cuh has the products of a warpgroup.
//
// "PTX:" names the instruction to look up in the PTX ISA.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "common/ptx.cuh"

namespace jvp_attn {

constexpr int kWarpgroupThreads = 128;

// The index of a factor that is contiguous in shared memory: the contracted one (K-major) or the
// one of the result (MN-major).
enum class Major { contraction = 0, result = 1 };

}  // namespace jvp_attn

#ifdef JVP_ATTN_EMULATOR
#include "emulated_ptx_sm90.h"
#else

#include <cuda.h>
#include <cudaTypedefs.h>

#include "sm90/wgmma.cuh"

namespace jvp_attn {

// A TMA descriptor of a tensor, which `encode_tensor_map` encodes on the host.
using TensorMap = CUtensorMap;

// ---------------------------------------------------------------------------------------------
// Thread indices and registers

// Uniform within a warp, and known to the compiler to be.
DEVICE int warpgroup_index() {
    return __shfl_sync(0xffffffff, static_cast<int>(threadIdx.x) / kWarpgroupThreads, 0);
}

// True for one lane of the warp, the same at each call. All lanes call. (PTX: elect.sync)
DEVICE bool elect_one() {
    uint32_t elected;
    asm volatile("{.reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p;}"
                 : "=r"(elected));
    return elected;
}

// Raises the registers of each thread of this warpgroup; waits until other warpgroups have released
// enough. Needs __launch_bounds__ with one block. (PTX: setmaxnreg)
template <int Registers>
DEVICE void warpgroup_reg_alloc() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}

// Lowers the registers of each thread of this warpgroup. (PTX: setmaxnreg)
template <int Registers>
DEVICE void warpgroup_reg_dealloc() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}

// ---------------------------------------------------------------------------------------------
// Barriers and fences

// Orders the shared memory accesses of a warp's lanes.
DEVICE void warp_barrier() { __syncwarp(); }

// Waits at barrier 1 to 15 until `threads` threads of the block have arrived, in this function or
// in named_barrier_arrive. Whole warps call. (PTX: barrier)
DEVICE void named_barrier_sync(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

DEVICE void named_barrier_arrive(int barrier, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// An mbarrier is 8 bytes of shared memory. Its phase, 0 or 1, ends when `arrivals` threads and all
// bytes that they expect have arrived; then the other phase begins. (PTX: mbarrier.init)
DEVICE void mbarrier_init(SharedAddress barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals)
                 : "memory");
}

// Makes the mbarriers that this thread has initialised visible to the TMA. (PTX: fence)
DEVICE void fence_mbarrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrives; earlier writes of this thread are visible to threads that wait for the phase.
// (PTX: mbarrier.arrive)
DEVICE void mbarrier_arrive(SharedAddress barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and the phase also waits for `bytes` more bytes. (PTX: mbarrier.arrive.expect_tx)
DEVICE void mbarrier_arrive_expect(SharedAddress barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}

// Waits for the end of `phase`; returns at once if the current phase is the other one.
// (PTX: mbarrier.try_wait)
DEVICE void mbarrier_wait(SharedAddress barrier, int phase) {
    asm volatile(
        "{\n"
        ".reg .pred over;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
        "@!over bra again;\n"
        "}" ::"r"(barrier),
        "r"(phase)
        : "memory");
}

// Orders this thread's reads and writes of shared memory before those of TMA and wgmma. It precedes
// the barrier that signals them. (PTX: fence.proxy)
DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---------------------------------------------------------------------------------------------
// Atomic sums in global memory. The order is nondeterministic, and so is the rounding of the sum.

// (PTX: red)
DEVICE void global_add(float* address, float x) {
    asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(address), "f"(x) : "memory");
}

// Adds to four successive float32; the address is a multiple of 16 bytes. (PTX: red)
DEVICE void global_add4(float* address, const float (&x)[4]) {
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(address),
                 "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3])
                 : "memory");
}

// ---------------------------------------------------------------------------------------------
// TMA

// Loads the box of a tensor at these coordinates into the panel at `target`, a multiple of 1024.
// Row i is 128 bytes at 128 i, with 16-byte chunk c at c ^ (i % 8). Elements beyond the tensor are
// zero. All bytes of the box arrive at `barrier`. One thread calls. (PTX: cp.async.bulk.tensor)
DEVICE void tma_load_4d(SharedAddress target, const TensorMap& map, SharedAddress barrier,
                        int column, int row, int head, int batch) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(target),
        "l"(&map), "r"(barrier), "r"(column), "r"(row), "r"(head), "r"(batch)
        : "memory");
}

// Prefetches the descriptor. (PTX: prefetch)
DEVICE void prefetch_map(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// ---------------------------------------------------------------------------------------------
// Matrices

// Stores four 8 x 8 matrices; lane 8i + j gives the address of row j of matrix i.
// (PTX: stmatrix)
DEVICE void store_matrices(SharedAddress row, const Words4& x) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
                 "r"(x.word[0]), "r"(x.word[1]), "r"(x.word[2]), "r"(x.word[3])
                 : "memory");
}

// Orders earlier accesses of the warpgroup to registers and shared memory before its next products.
// (PTX: wgmma.fence)
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Closes a group of the warpgroup's products, which may be empty. (PTX: wgmma.commit_group)
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most `Pending` of the latest groups are still in flight. (PTX: wgmma.wait_group)
template <int Pending>
DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

// The compiler does not know that products in flight access these registers; this keeps it from
// moving other accesses across this line. Call it before wgmma_fence and after wgmma_wait.
template <int Blocks>
DEVICE void warpgroup_fence_operand(float (&registers)[Blocks][4]) {
#pragma unroll
    for (int i = 0; i < Blocks; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) asm volatile("" : "+f"(registers[i][e])::"memory");
}

template <int Steps>
DEVICE void warpgroup_fence_operand(uint32_t (&registers)[Steps][4]) {
#pragma unroll
    for (int i = 0; i < Steps; ++i)
#pragma unroll
        for (int word = 0; word < 4; ++word) asm volatile("" : "+r"(registers[i][word])::"memory");
}

// ---------------------------------------------------------------------------------------------
// Advice to the compiler. These functions change no value.

// The same address, uniform within the warp and known to the compiler to be: matrix descriptors
// made of it are computed in uniform registers.
DEVICE SharedAddress warp_uniform(SharedAddress address) {
    return __shfl_sync(0xffffffff, address, 0);
}

// The same address, known only once `value` is. ptxas may move a wgmma_wait up to an earlier access
// of a barrier, but not past one whose address depends on what is computed in between.
DEVICE SharedAddress known_after(float value, SharedAddress address) {
    uint32_t zero;  // the grid has one dimension
    asm volatile("mov.u32 %0, %%ctaid.z;" : "=r"(zero));
    return address + (__float_as_uint(value) & zero);
}

// ---------------------------------------------------------------------------------------------
// On the host

struct DeviceFacts {
    int capability = 0;  // 90 is 9.0
    int multiprocessors = 0;
};

// Queries the current device. Returns an error, empty if none.
inline std::string current_device(DeviceFacts& facts) {
    int device = 0, major = 0, minor = 0;
    cudaError_t status = cudaGetDevice(&device);
    if (status == cudaSuccess)
        status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (status == cudaSuccess)
        status = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (status == cudaSuccess)
        status =
            cudaDeviceGetAttribute(&facts.multiprocessors, cudaDevAttrMultiProcessorCount, device);
    facts.capability = 10 * major + minor;
    if (status == cudaSuccess) return "";
    cudaGetLastError();  // clear the error, or the next caller would see it again
    return cudaGetErrorString(status);
}

// Encodes the TMA descriptor of a tensor of 2-byte elements (column, row, head, batch) with
// contiguous columns. `strides` are those of rows, heads and batches in bytes. A box is 64 columns
// by `box_rows` rows, swizzled as tma_load_4d says. Returns an error, empty if none. The driver's
// function is looked up at run time, so that nothing links to libcuda.
inline std::string encode_tensor_map(TensorMap& map, const void* data, const uint64_t (&sizes)[4],
                                     const uint64_t (&strides)[3], int box_rows) {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const char* name = "cuTensorMapEncodeTiled";
#if CUDART_VERSION < 12050  // finds the version of the function that this CUDA has: the only one
    const cudaError_t status = cudaGetDriverEntryPoint(name, &function, cudaEnableDefault, &found);
#else
    const cudaError_t status =
        cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found);
#endif
    if (status != cudaSuccess || found != cudaDriverEntryPointSuccess) {
        cudaGetLastError();
        return "the CUDA driver is older than 12.0 and has no tensor maps";
    }
    const uint32_t box[4] = {64, static_cast<uint32_t>(box_rows), 1, 1};
    const uint32_t every[4] = {1, 1, 1, 1};
    const CUresult result = reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function)(
        &map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 4, const_cast<void*>(data), sizes, strides, box,
        every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result == CUDA_SUCCESS) return "";
    return "the CUDA driver refuses a tensor map, error " + std::to_string(result);
}

}  // namespace jvp_attn

#endif  // JVP_ATTN_EMULATOR
