// Named barriers 1 to 15 of a block (bar.sync, bar.arrive), for some of its warps.
#pragma once

#include <array>
#include <cstdint>

#include "happens_before.h"
#include "report.h"
#include "waitable.h"

namespace jvp_attn::emulator {

class NamedBarrier : public Waitable {
public:
    void start_block(int number);

    // A warp arrives. Returns whether it completes the barrier.
    bool arrive(const Actor& actor, int threads, HappensBefore& order);

    uint32_t generation() const { return generation_; }
    // The clocks of the threads that arrived in complete generations.
    const VectorClocks& released() const { return released_; }
    // An error if the block ends when only some of the threads have arrived.
    void check_finished() const;
    std::string state() const override;

private:
    int number_ = 0;
    int threads_ = 0;  // that this generation needs
    int arrived_ = 0;
    uint32_t warps_ = 0;  // that have arrived, a bit each
    uint32_t generation_ = 0;
    Actor last_ = {};  // of those that have arrived
    VectorClocks gathered_, released_;
};

class NamedBarriers {
public:
    void start_block();
    NamedBarrier& at(const Actor& actor, int number);
    void check_finished() const;

private:
    std::array<NamedBarrier, 16> barriers_;
};

}  // namespace jvp_attn::emulator
