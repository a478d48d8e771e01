// Where things are in the shared memory of a block.
#pragma once

#include "common/ptx.cuh"

namespace jvp_attn {

// Hands out shared memory, from its start on.
struct SmemAllocator {
    SharedAddress next = shared_memory();

    DEVICE SharedAddress take(int bytes) {
        const SharedAddress start = next;
        next += bytes;
        return start;
    }
};

}  // namespace jvp_attn
