// A ring of slots in shared memory: a producer fills them in order, consumers empty them.
//
// Each slot has two mbarriers: `full` ends a phase when what was loaded is here, `empty` when no
// consumer needs it any more.
#pragma once

#include "sm90/tile.cuh"

namespace jvp_attn::sm90 {

// Where in a ring someone is. Phases alternate from round to round.
template <int Slots>
struct Position {
    int slot = 0;
    int phase = 0;

    DEVICE void advance() {
        if (++slot == Slots) {
            slot = 0;
            phase ^= 1;
        }
    }
};

template <int Slots, int SlotBytes>
struct Ring {
    static constexpr int kBarrierBytes = 16 * Slots;
    static constexpr int kBytes = Slots * SlotBytes;

    SharedAddress slots, barriers;

    // By one thread, before any other uses the ring.
    DEVICE void init(int producers, int consumers) const {
        for (int slot = 0; slot < Slots; ++slot) {
            mbarrier_init(full({slot, 0}), producers);
            mbarrier_init(empty({slot, 0}), consumers);
        }
    }

    DEVICE SharedAddress slot(const Position<Slots>& at) const {
        return slots + at.slot * SlotBytes;
    }

    DEVICE SharedAddress full(const Position<Slots>& at) const { return barriers + 16 * at.slot; }

    DEVICE void wait_full(const Position<Slots>& at) const { mbarrier_wait(full(at), at.phase); }

    // In the first round all slots are empty.
    DEVICE void wait_empty(const Position<Slots>& at) const {
        mbarrier_wait(empty(at), at.phase ^ 1);
    }

    DEVICE void release(const Position<Slots>& at) const { mbarrier_arrive(empty(at)); }

private:
    DEVICE SharedAddress empty(const Position<Slots>& at) const {
        return barriers + 16 * at.slot + 8;
    }
};

}  // namespace jvp_attn::sm90
