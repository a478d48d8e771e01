// All kernels of the conformance test. nvcc compiles this file for the GPU, g++ for the emulator.
#include "conformance_kernels.cuh"

JVP_ATTN_KERNEL(indices, Indices)
JVP_ATTN_KERNEL(reverse_floats, ReverseFloats)
JVP_ATTN_KERNEL(reverse_words, ReverseWords)
JVP_ATTN_KERNEL(copy_groups, CopyGroups)
JVP_ATTN_KERNEL(copy_nothing, CopyNothing)
JVP_ATTN_KERNEL(widen_bytes, Widen<uint8_t>)
JVP_ATTN_KERNEL(widen_elements, Widen<uint16_t>)
JVP_ATTN_KERNEL(copy_elements, CopyElements)
JVP_ATTN_KERNEL(copy_async_parts, CopyAsync)
JVP_ATTN_KERNEL(any, Any)
JVP_ATTN_KERNEL(shuffle, ShuffleXor)
JVP_ATTN_KERNEL(matrices, LoadMatrices<false>)
JVP_ATTN_KERNEL(matrices_transposed, LoadMatrices<true>)
JVP_ATTN_KERNEL(multiply_add_bf16, MultiplyAdd<Bf16>)
JVP_ATTN_KERNEL(multiply_add_fp16, MultiplyAdd<Fp16>)
JVP_ATTN_KERNEL(exp2, FastExp2)
JVP_ATTN_KERNEL(multiply, MultiplyRn)
JVP_ATTN_KERNEL(divide, FastDivide)
JVP_ATTN_KERNEL(pack_bf16, Pack<Bf16>)
JVP_ATTN_KERNEL(pack_fp16, Pack<Fp16>)
JVP_ATTN_KERNEL(unpack_bf16, Unpack<Bf16>)
JVP_ATTN_KERNEL(unpack_fp16, Unpack<Fp16>)

const std::vector<jvp_attn::Kernel>& jvp_attn::all_kernels() {
    static const std::vector<Kernel> kernels = {
        indices,
        reverse_floats,
        reverse_words,
        any,
        shuffle,
        copy_groups,
        copy_nothing,
        copy_async_parts,
        widen_bytes,
        widen_elements,
        copy_elements,
        matrices,
        matrices_transposed,
        multiply_add_bf16,
        multiply_add_fp16,
        exp2,
        multiply,
        divide,
        pack_bf16,
        pack_fp16,
        unpack_bf16,
        unpack_fp16,
    };
    return kernels;
}
