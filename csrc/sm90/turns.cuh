// Consumer warpgroups that take turns at the tensor cores: one issues its products while the others
// compute (FlashAttention-3, arXiv 2407.08608, section 3.1).
#pragma once

#include "sm90/ptx.cuh"

namespace jvp_attn::sm90 {

// Each warpgroup waits at a named barrier of its own, at which the one before it arrives. All
// warpgroups take equally many turns.
template <int Warpgroups>
struct Turns {
    // Each warpgroup calls this before its first turn; the first turn is that of warpgroup 1.
    DEVICE static void begin() {
        if (warpgroup_index() == Warpgroups) pass();
    }

    DEVICE static void await() { named_barrier_sync(warpgroup_index(), 2 * kWarpgroupThreads); }

    DEVICE static void pass() {
        named_barrier_arrive(warpgroup_index() % Warpgroups + 1, 2 * kWarpgroupThreads);
    }

    // Each warpgroup calls this after its last turn, so that no barrier is left half complete.
    DEVICE static void end() {
        if (warpgroup_index() == 1) await();
    }
};

}  // namespace jvp_attn::sm90
