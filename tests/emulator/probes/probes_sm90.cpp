#include "probes_sm90.h"

#include "tile_products.h"

namespace jvp_attn::sm90 {

namespace {

template <class K>
Kernel kernel(const char* name) {
    return {name, K::kThreads, K::kSharedBytes, launch<K>};
}

}  // namespace

#define FAULT(NAME) kernel<TileProducts<Fault::NAME>>("sm90_" #NAME)

std::vector<Kernel> broken_kernels() {
    return {
        FAULT(none),
        FAULT(missing_proxy_fence),
        FAULT(missing_proxy_fence_after_read),
        FAULT(missing_named_barrier),
        FAULT(named_barrier_of_more),
        FAULT(named_barrier_of_different),
        FAULT(missing_barrier_after_init),
        FAULT(missing_init_fence),
        FAULT(no_mbarrier),
        FAULT(wrong_phase),
        FAULT(constant_phase),
        FAULT(expects_too_much),
        FAULT(expects_too_little),
        FAULT(missing_arrival),
        FAULT(too_many_arrivals),
        FAULT(missing_wait_for_empty),
        FAULT(released_too_early),
        FAULT(misaligned_box),
        FAULT(box_of_no_tensor),
        FAULT(unfinished_box),
        FAULT(missing_wgmma_fence),
        FAULT(missing_wgmma_wait),
        FAULT(missing_wgmma_commit),
        FAULT(unfinished_product),
        FAULT(accumulator_changed),
        FAULT(accumulator_pinned),
        FAULT(factor_changed),
        FAULT(factor_changed_after_fence),
        FAULT(wrong_leading_offset),
        FAULT(wrong_stride_offset),
        FAULT(misaligned_descriptor),
        FAULT(other_swizzle),
        FAULT(different_products),
        FAULT(warp_without_product),
        FAULT(too_many_registers),
        FAULT(fewer_registers),
        FAULT(different_registers),
        FAULT(stored_instead_of_added),
        FAULT(stored_where_others_add),
        FAULT(read_where_others_add),
        FAULT(added_beyond_the_end),
        FAULT(misaligned_sums),
        FAULT(sums_in_flight),
    };
}

}  // namespace jvp_attn::sm90
