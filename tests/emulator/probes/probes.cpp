// All probe kernels: those of one instruction each, and those with a fault.
#include "instructions.h"
#include "probes_sm90.h"
#include "row_sums.h"

namespace jvp_attn {

namespace {

template <class K>
Kernel kernel(const char* name) {
    return {name, K::kThreads, K::kSharedBytes, launch<K>};
}

std::vector<Kernel> sm80_kernels() {
    return {
        kernel<Pack<Bf16>>("pack_bf16"),
        kernel<Pack<Fp16>>("pack_fp16"),
        kernel<Unpack<Bf16>>("unpack_bf16"),
        kernel<Unpack<Fp16>>("unpack_fp16"),
        kernel<FastExp2>("fast_exp2"),
        kernel<ShuffleXor>("shuffle_xor"),
        kernel<Any>("any"),
        kernel<CopyAsync>("copy_async"),
        kernel<LoadMatrices<false>>("load_matrices"),
        kernel<LoadMatrices<true>>("load_matrices_transposed"),
        kernel<MultiplyAdd<Bf16>>("multiply_add_bf16"),
        kernel<MultiplyAdd<Fp16>>("multiply_add_fp16"),
        kernel<RowSums<Fault::none>>("none"),
        kernel<RowSums<Fault::missing_barrier>>("missing_barrier"),
        kernel<RowSums<Fault::missing_barrier_after_wait>>("missing_barrier_after_wait"),
        kernel<RowSums<Fault::overwritten_too_early>>("overwritten_too_early"),
        kernel<RowSums<Fault::missing_wait>>("missing_wait"),
        kernel<RowSums<Fault::missing_commit>>("missing_commit"),
        kernel<RowSums<Fault::unfinished_copies>>("unfinished_copies"),
        kernel<RowSums<Fault::other_swizzle>>("other_swizzle"),
        kernel<RowSums<Fault::half_a_tile>>("half_a_tile"),
        kernel<RowSums<Fault::shared_index_out_of_range>>("shared_index_out_of_range"),
        kernel<RowSums<Fault::global_read_out_of_range>>("global_read_out_of_range"),
        kernel<RowSums<Fault::global_write_out_of_range>>("global_write_out_of_range"),
        kernel<RowSums<Fault::write_to_an_input>>("write_to_an_input"),
        kernel<RowSums<Fault::two_writers>>("two_writers"),
        kernel<RowSums<Fault::misaligned_copy>>("misaligned_copy"),
        kernel<RowSums<Fault::misaligned_matrix_row>>("misaligned_matrix_row"),
        kernel<RowSums<Fault::misaligned_store>>("misaligned_store"),
        kernel<RowSums<Fault::divergent_shuffle>>("divergent_shuffle"),
        kernel<RowSums<Fault::divergent_instructions>>("divergent_instructions"),
        kernel<RowSums<Fault::divergent_barrier>>("divergent_barrier"),
        kernel<RowSums<Fault::lane_exits_early>>("lane_exits_early"),
        kernel<RowSums<Fault::warp_exits_early>>("warp_exits_early"),
        kernel<RowSums<Fault::endless_loop>>("endless_loop"),
    };
}

}  // namespace

const std::vector<Kernel>& all_kernels() {
    static const std::vector<Kernel> kernels = [] {
        std::vector<Kernel> kernels = sm80_kernels();
        for (const Kernel& kernel : sm90::faulty_kernels()) kernels.push_back(kernel);
        return kernels;
    }();
    return kernels;
}

}  // namespace jvp_attn
