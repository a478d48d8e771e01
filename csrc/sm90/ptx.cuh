// The instructions that compute capability 9.0 adds, under plain names, as in common/ptx.cuh: warps
// meet at named barriers and mbarriers, the bulk TMA (TMA) fills shared memory, and four
// warps multiply together (wgmma).
//
// "PTX:" names the instruction to look up in the PTX ISA.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "common/ptx.cuh"

namespace jvp_attn {

constexpr int kWarpgroupThreads = 128;

// Which index of a factor runs along its rows in shared memory: the one that a product sums over,
// or the one that is left in the result. PTX calls them K-major and MN-major.
enum class Major { contraction = 0, result = 1 };

}  // namespace jvp_attn

#ifdef JVP_ATTN_EMULATOR
#include "emulated_ptx_sm90.h"
#else

#include <cuda.h>
#include <cudaTypedefs.h>

#include "sm90/wgmma.cuh"

namespace jvp_attn {

// What the TMA is told of a tensor; `encode_tensor_map` makes one on the host.
using TensorMap = CUtensorMap;

// ---------------------------------------------------------------------------------------------
// Who a thread is, and how warps share the registers

// The same for all threads of a warp, and the compiler knows it.
DEVICE int warpgroup_index() {
    return __shfl_sync(0xffffffff, static_cast<int>(threadIdx.x) / kWarpgroupThreads, 0);
}

// True for one lane of the warp, the same at each call. All of them call. (PTX: elect.sync)
DEVICE bool elect_one() {
    uint32_t elected;
    asm volatile("{.reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p;}"
                 : "=r"(elected));
    return elected;
}

// From here on a thread of this warpgroup has so many registers, more than before; it waits until
// others have released theirs. Needs __launch_bounds__ with one block. (PTX: setmaxnreg)
template <int Registers>
DEVICE void warpgroup_reg_alloc() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}

// The same with fewer than before.
template <int Registers>
DEVICE void warpgroup_reg_dealloc() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}

// ---------------------------------------------------------------------------------------------
// How threads meet

// Orders the shared memory accesses of a warp's lanes.
DEVICE void warp_barrier() { __syncwarp(); }

// Waits at barrier 1 to 15 until so many threads of the block have come to it, those included that
// only arrive. Whole warps come. (PTX: barrier)
DEVICE void named_barrier_sync(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

DEVICE void named_barrier_arrive(int barrier, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// An mbarrier is 8 bytes of shared memory. Its phase, 0 or 1, ends when so many threads have
// arrived, and as many bytes as they expect; then the other phase begins.
// (PTX: mbarrier.init)
DEVICE void mbarrier_init(SharedAddress barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals)
                 : "memory");
}

// Shows the TMA the mbarriers that this thread has initialised. (PTX: fence)
DEVICE void fence_mbarrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// What this thread did before is visible to whoever waits for the phase.
// (PTX: mbarrier.arrive)
DEVICE void mbarrier_arrive(SharedAddress barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// The same, and the phase lasts until so many more bytes are here.
DEVICE void mbarrier_arrive_expect(SharedAddress barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}

// Waits for the end of a phase: of the current one, or returns at once if that is the other one.
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

// Orders this thread's own reads and writes of shared memory before what TMA and wgmma do
// there. The barrier that tells of them comes after it. (PTX: fence.proxy)
DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---------------------------------------------------------------------------------------------
// Sums in global memory. Other threads may add to the same place meanwhile; which comes first is
// not known, and so neither is the last bit of a sum.

// (PTX: red)
DEVICE void global_add(float* address, float x) {
    asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(address), "f"(x) : "memory");
}

// Four successive sums; the address is a multiple of 16 bytes. (PTX: red)
DEVICE void global_add4(float* address, const float (&x)[4]) {
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(address),
                 "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3])
                 : "memory");
}

// ---------------------------------------------------------------------------------------------
// The bulk TMA

// Loads a box of a map at these coordinates into the panel at `target`, a multiple of 1024: row i
// are 128 bytes from 128 i on, in which 16-byte chunk c is at place c ^ (i % 8). Elements beyond
// the tensor are zeros. All bytes of the box count in `barrier`. One thread calls.
// (PTX: cp.async.bulk.tensor)
DEVICE void tma_load_4d(SharedAddress target, const TensorMap& map, SharedAddress barrier,
                        int column, int row, int head, int batch) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(target),
        "l"(&map), "r"(barrier), "r"(column), "r"(row), "r"(head), "r"(batch)
        : "memory");
}

// Fetches the map itself. (PTX: prefetch)
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

// Orders what a warpgroup did to registers, and what it waited for, before the products that it
// starts next. (PTX: wgmma.fence)
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Closes a group of the warpgroup's products, perhaps an empty one. (PTX: wgmma.commit_group)
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most `Pending` of the latest groups are still under way. (PTX: wgmma.wait_group)
template <int Pending>
DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

// The compiler does not know that products still write or read these registers: it moves no use of
// them across this line. Comes between the last other use and `wgmma_fence`, and after the wait.
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

// The same value, of which the compiler knows nothing: what follows from it is computed here, and
// not ahead of a loop, to occupy registers all the while.
DEVICE int opaque(int value) {
    asm volatile("" : "+r"(value));
    return value;
}

// ---------------------------------------------------------------------------------------------
// On the host

struct DeviceFacts {
    int capability = 0;  // 90 is 9.0
    int multiprocessors = 0;
};

// Of the current device. Returns an error, empty if none.
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
    cudaGetLastError();  // or CUDA would report this failure once more, to the next caller that
                         // asks
    return cudaGetErrorString(status);
}

// Describes 2-byte elements (column, row, head, batch), columns contiguous, to the TMA;
// strides are those of rows, heads and batches, in bytes. A box is 64 columns by so many rows, with
// its 16-byte chunks in the places that `tma_load_4d` says. Returns an error, empty if none.
// The driver's function is looked up at run time: nothing is linked to libcuda.
inline std::string encode_tensor_map(TensorMap& map, const void* data, const uint64_t (&sizes)[4],
                                     const uint64_t (&strides)[3], int box_rows) {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                                12000, cudaEnableDefault, &found);
    if (status != cudaSuccess || found != cudaDriverEntryPointSuccess) {
        cudaGetLastError();  // as above
        return "the CUDA driver is older than 12.0, and has no tensor maps";
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
