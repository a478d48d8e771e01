// Chooses the thread of a block that runs next, at random from a seed.
#pragma once

#include <array>
#include <bit>
#include <cstdint>

namespace jvp_attn::emulator {

constexpr int kWarpThreads = 32;
constexpr int kMaxWarps = 32;
constexpr uint32_t kAllLanes = 0xffffffff;

// xorshift64*
class Random {
public:
    explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15 + 0x2545f4914f6cdd1d) {}

    uint64_t next() {
        state_ ^= state_ >> 12;
        state_ ^= state_ << 25;
        state_ ^= state_ >> 27;
        return state_ * 0x2545f4914f6cdd1d;
    }

private:
    uint64_t state_;
};

class Scheduler {
public:
    // The seed also determines how long a warp runs before another one does: until it has to wait,
    // or for 64, 8 or 1 turns of its threads on average.
    explicit Scheduler(uint64_t seed) : random_(seed) {
        constexpr std::array<uint64_t, 4> turns = {1 << 30, 64, 8, 1};
        leave_mask_ = turns[random_.next() >> 62] - 1;
    }

    Random& random() { return random_; }

    // All threads are runnable, and any may be the first.
    void start_block(int warps) {
        for (int warp = 0; warp < warps; ++warp) set_runnable(warp);
        warp_ = static_cast<int>(random_.next() % warps);
    }

    // These threads of a warp can continue.
    void set_runnable(int warp, uint32_t lanes = kAllLanes) {
        lanes_[warp] |= lanes;
        warps_ |= uint32_t{1} << warp;
    }

    bool is_idle() const { return warps_ == 0; }

    // Removes a thread from the runnable ones; -1 if there is none.
    int next() {
        const uint64_t random = random_.next();
        if (lanes_[warp_] == 0 || (random >> 32 & leave_mask_) == 0) {
            if (warps_ == 0) return -1;
            warp_ = set_bit(warps_, random >> 5 & 31);
        }
        const int lane = set_bit(lanes_[warp_], random & 31);
        lanes_[warp_] &= ~(uint32_t{1} << lane);
        if (lanes_[warp_] == 0) warps_ &= ~(uint32_t{1} << warp_);
        return warp_ * kWarpThreads + lane;
    }

private:
    // The number of the first set bit from a position on, cyclically.
    static int set_bit(uint32_t bits, int from) {
        return (from + std::countr_zero(std::rotr(bits, from))) & 31;
    }

    Random random_;
    uint64_t leave_mask_;
    std::array<uint32_t, kMaxWarps> lanes_ = {};  // the runnable ones of each warp
    uint32_t warps_ = 0;                          // that have any
    int warp_ = 0;                                // that ran last
};

}  // namespace jvp_attn::emulator
