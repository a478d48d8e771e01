// The boxes of tensors that the TMA is loading into the shared memory of a block.
//
// Each load completes as a whole, at a time and in an order drawn from the seed. Only then it reads
// its source.
#pragma once

#include <array>
#include <vector>

#include "global_memory.h"
#include "mbarriers.h"
#include "scheduler.h"
#include "shared_memory.h"
#include "tensor_map.h"

namespace jvp_attn::emulator {

// The address of a byte under the 128-byte swizzle, which permutes the 16-byte chunks of a row.
constexpr SharedAddress swizzled(SharedAddress address) {
    return address ^ (address >> 7 & 7) << 4;
}

class TmaLoads {
public:
    void start_block() { loads_.clear(); }

    // (column, row, head, batch) of the start of a box.
    using Coordinates = std::array<int, 4>;

    void issue(const Actor& actor, SharedAddress target, const TensorMap& map, Mbarrier& barrier,
               const Coordinates& start, const HappensBefore& order, SharedMemory& shared,
               const GlobalMemory& global);

    bool any() const { return !loads_.empty(); }

    // Completes a load. Returns its mbarrier if that ends a phase.
    Mbarrier* complete_one(Random& random, SharedMemory& shared);

private:
    struct Load {
        Actor actor;
        SharedAddress target;
        TensorMap map;
        Mbarrier* barrier;
        Coordinates start;
    };

    std::vector<Load> loads_;
};

}  // namespace jvp_attn::emulator
