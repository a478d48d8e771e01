// Consumer warpgroups that take turns at the tensor cores: one issues its products while the others
// compute (FlashAttention-3, arXiv 2407.08608, section 3.1).
#pragma once

#include "sm90/ptx.cuh"

namespace jvp_attn::sm90 {

// Whether a kernel takes turns. nvcc -DJVP_ATTN_TURNS=0 or 1 overrides what each kernel does by
// default, to compare both on a GPU.
#ifdef JVP_ATTN_TURNS
constexpr bool takes_turns(bool) { return JVP_ATTN_TURNS; }
#else
constexpr bool takes_turns(bool by_default) { return by_default; }
#endif

// Each warpgroup waits at a named barrier of its own, at which the one before it arrives: barriers
// FirstBarrier to FirstBarrier + Warpgroups - 1. All warpgroups take equally many turns.
template <int Warpgroups, int FirstBarrier = 1>
struct Turns {
    // Each warpgroup calls this before its first turn; the first turn is that of warpgroup 1.
    DEVICE static void begin() {
        if (warpgroup_index() == Warpgroups) pass();
    }

    DEVICE static void await() {
        named_barrier_sync(FirstBarrier + consumer(), 2 * kWarpgroupThreads);
    }

    DEVICE static void pass() {
        named_barrier_arrive(FirstBarrier + (consumer() + 1) % Warpgroups, 2 * kWarpgroupThreads);
    }

    // Each warpgroup calls this after its last turn, so that no barrier is left half complete.
    DEVICE static void end() {
        if (warpgroup_index() == 1) await();
    }

private:
    // The number of this warpgroup among the consumers. `opaque`: loops have no register for it.
    DEVICE static int consumer() { return opaque(thread_index()) / kWarpgroupThreads - 1; }
};

}  // namespace jvp_attn::sm90
