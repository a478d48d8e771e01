// csrc/sm90/tensor_map.h as nvcc compiles it, and the function of the CUDA runtime that it calls.
//
// The other files compile csrc with the emulator's instructions. To be linked with them, this one
// gives csrc's namespace another name.
#define jvp_attn jvp_attn_cuda

#include <cuda_runtime.h>
#include <device_launch_parameters.h>

#include <algorithm>
#include <string>

#include "tensor_map_calls.h"

// Builtins of nvcc that csrc/common/ptx.cuh and csrc/sm90/ptx.cuh use. Nothing calls them here.
template <class T>
T __shfl_sync(unsigned, T, int);
template <class T>
T __shfl_xor_sync(unsigned, T, int);
void __syncwarp();
int __syncthreads_or(int);
int __any_sync(unsigned, int);
std::size_t __cvta_generic_to_shared(const void*);
float __fmul_rn(float, float);
float __uint_as_float(unsigned);
unsigned __float_as_uint(float);

#include "sm90/tensor_map.h"

namespace witness_tma {

static CUresult record(CUtensorMap*, CUtensorMapDataType type, cuuint32_t rank, void* address,
                       const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                       const cuuint32_t* element_strides, CUtensorMapInterleave interleave,
                       CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                       CUtensorMapFloatOOBfill fill) {
    if (rank < 1 || rank > 5) return CUDA_ERROR_INVALID_VALUE;
    EncodeCall call = {};
    call.address = reinterpret_cast<uint64_t>(address);
    // The type matters for its size alone, as no number is converted.
    const bool two_bytes = type == CU_TENSOR_MAP_DATA_TYPE_UINT16 ||
                           type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16 ||
                           type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    call.element_bytes = two_bytes ? 2 : 0;
    call.rank = static_cast<int>(rank);
    std::copy_n(sizes, rank, call.sizes);
    std::copy_n(strides, rank - 1, call.strides);
    std::copy_n(box, rank, call.box);
    std::copy_n(element_strides, rank, call.element_strides);
    call.interleave = interleave;
    call.swizzle = swizzle;
    call.fill = fill;
    encode_calls.push_back(call);
    return CUDA_SUCCESS;
}

std::string encode_by_csrc(const TensorView& x, bool of_keys, int box_rows) {
    constexpr int kOther = 8;  // rows of the boxes that must not be used
    jvp_attn::sm90::Params params;
    jvp_attn::AttentionParams& p = params.attention;
    (of_keys ? p.v : p.q) = {reinterpret_cast<void*>(x.address), x.batch_stride, x.row_stride,
                             x.head_stride};
    p.batch = x.batches;
    (of_keys ? p.heads_k : p.heads) = x.heads;
    (of_keys ? p.seqlen_k : p.seqlen_q) = x.rows;
    (of_keys ? p.head_dim_v : p.head_dim) = x.columns;
    return jvp_attn::sm90::encode_tensor_maps(params, of_keys ? kOther : box_rows,
                                              of_keys ? box_rows : kOther);
}

}  // namespace witness_tma

// ---------------------------------------------------------------------------------------------
// The CUDA runtime

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
    const bool known = std::string(name) == "cuTensorMapEncodeTiled";
    *function = known ? reinterpret_cast<void*>(&witness_tma::record) : nullptr;
    *found = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}

#if CUDART_VERSION < 13000
cudaError_t cudaGetDriverEntryPoint(const char* name, void** function, unsigned long long flags,
                                    cudaDriverEntryPointQueryResult* found) {
    return cudaGetDriverEntryPointByVersion(name, function, 0, flags, found);
}
#endif

cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "no error"; }
