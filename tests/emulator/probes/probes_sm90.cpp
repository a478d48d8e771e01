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

std::vector<Kernel> faulty_kernels() {
    return {
        FAULT(none),
        FAULT(missing_proxy_fence),
        FAULT(missing_proxy_fence_after_read),
        FAULT(missing_named_barrier),
        FAULT(named_barrier_of_too_many),
        FAULT(named_barrier_counts_differ),
        FAULT(turn_passed_twice),
        FAULT(turn_never_passed),
        FAULT(turn_passed_to_itself),
        FAULT(turn_left_over),
        FAULT(address_differs_between_lanes),
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
        FAULT(misaligned_tma_target),
        FAULT(null_tensor_map),
        FAULT(unfinished_tma_load),
        FAULT(missing_wgmma_fence),
        FAULT(missing_wgmma_wait),
        FAULT(missing_wgmma_commit),
        FAULT(unfinished_wgmma),
        FAULT(accumulator_changed),
        FAULT(accumulator_fenced),
        FAULT(operand_changed),
        FAULT(operand_changed_after_fence),
        FAULT(wrong_leading_offset),
        FAULT(wrong_stride_offset),
        FAULT(misaligned_descriptor),
        FAULT(other_swizzle),
        FAULT(divergent_wgmma),
        FAULT(warp_without_wgmma),
        FAULT(too_many_registers),
        FAULT(fewer_registers),
        FAULT(different_registers),
        FAULT(store_instead_of_add),
        FAULT(store_where_others_add),
        FAULT(read_where_others_add),
        FAULT(add_out_of_range),
        FAULT(misaligned_add),
        FAULT(add_in_flight),
    };
}

}  // namespace jvp_attn::sm90
