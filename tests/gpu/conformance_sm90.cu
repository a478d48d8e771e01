// All kernels of the conformance test for compute capability 9.0. nvcc compiles this file for the
// GPU, g++ for the emulator.
#include "conformance_kernels_sm90.cuh"

namespace jvp_attn::sm90 {

constexpr Major kColumns = Major::contraction, kRows = Major::result;  // the summed index

template <class K>
Kernel kernel(const char* name) {
    return {name, K::kThreads, K::kSharedBytes, launch<K>};
}

// Products with half a panel of 64 columns, or with 8 columns of a panel that is far behind the
// others: those of head dim 96 and of `backward`. The last number is the depth.
constexpr int kGap = 176 * 1024;
#define EDGE_PRODUCTS(ELEMENT, TYPE)                                                    \
    kernel<Product<TYPE, 96, kColumns, kRows, true, 112>>("product_" #ELEMENT           \
                                                          "_96_cr_registers_112"),      \
        kernel<Product<TYPE, 112, kColumns, kColumns, false, 96>>("product_" #ELEMENT   \
                                                                  "_112_cc_shared_96"), \
        kernel<Product<TYPE, 72, kRows, kRows, false, 128, kGap>>("product_" #ELEMENT   \
                                                                  "_72_rr_shared_128"), \
        kernel<Product<TYPE, 72, kColumns, kRows, true, 128, kGap>>("product_" #ELEMENT \
                                                                    "_72_cr_registers_128")

// The products that kernels use: rows of A times rows of B, rows times columns.
#define PRODUCTS(ELEMENT, TYPE, N)                                                                 \
    kernel<Product<TYPE, N, kColumns, kColumns, false>>("product_" #ELEMENT "_" #N "_cc_shared"),  \
        kernel<Product<TYPE, N, kColumns, kRows, false>>("product_" #ELEMENT "_" #N "_cr_shared"), \
        kernel<Product<TYPE, N, kColumns, kRows, true>>("product_" #ELEMENT "_" #N                 \
                                                        "_cr_registers")

}  // namespace jvp_attn::sm90

const std::vector<jvp_attn::Kernel>& jvp_attn::all_kernels() {
    using namespace sm90;
    static const std::vector<Kernel> kernels = {
        EDGE_PRODUCTS(bf16, Bf16),
        EDGE_PRODUCTS(fp16, Fp16),
        kernel<Identities>("identities"),
        kernel<ShareRegisters>("share_registers"),
        kernel<Advice>("advice"),
        kernel<ReverseInWarp>("reverse_in_warp"),
        kernel<ReverseByNamedBarriers>("reverse_by_named_barriers"),
        kernel<ReverseByMbarriers>("reverse_by_mbarriers"),
        kernel<AddToGlobal>("add_to_global"),
        kernel<LoadBoxes>("tma_load_boxes"),
        kernel<StoreMatrices>("store_matrices"),
        PRODUCTS(bf16, Bf16, 48),
        PRODUCTS(bf16, Bf16, 64),
        PRODUCTS(bf16, Bf16, 80),
        PRODUCTS(bf16, Bf16, 96),
        PRODUCTS(bf16, Bf16, 112),
        PRODUCTS(bf16, Bf16, 128),
        PRODUCTS(bf16, Bf16, 176),
        PRODUCTS(bf16, Bf16, 256),
        PRODUCTS(fp16, Fp16, 64),
        PRODUCTS(fp16, Fp16, 80),
        kernel<Product<Bf16, 64, kRows, kColumns, false>>("product_bf16_64_rc_shared"),
        kernel<Product<Bf16, 64, kRows, kRows, false>>("product_bf16_64_rr_shared"),
        kernel<Product<Bf16, 8, kRows, kColumns, false>>("product_bf16_8_rc_shared"),
        kernel<Product<Bf16, 64, kColumns, kColumns, true>>("product_bf16_64_cc_registers"),
    };
    return kernels;
}
