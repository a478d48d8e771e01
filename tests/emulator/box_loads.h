// The boxes of tensors that the TMA is loading into the shared memory of a block.
//
// Each lands all at once, at a moment and in an order drawn from the seed; its source is read then.
#pragma once

#include <array>
#include <vector>

#include "emulated_tensor_map.h"
#include "global_memory.h"
#include "mbarriers.h"
#include "scheduler.h"
#include "shared_memory.h"

namespace jvp_attn::emulator {

// The place of a byte where 16-byte chunks of 128-byte rows are swapped, in patterns of 8 rows.
constexpr SharedAddress swizzled(SharedAddress address) {
    return address ^ (address >> 7 & 7) << 4;
}

class BoxLoads {
public:
    void start_block() { loads_.clear(); }

    // Of (column, row, head, batch), where the box starts.
    using Coordinates = std::array<int, 4>;

    void issue(const Actor& actor, SharedAddress target, const TensorMap& map, Mbarrier& barrier,
               const Coordinates& start, const Order& order, SharedMemory& shared,
               const GlobalMemory& global);

    bool any() const { return !loads_.empty(); }

    // One of them lands. Returns its mbarrier if that has ended a phase.
    Mbarrier* land_one(Random& random, SharedMemory& shared);

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
