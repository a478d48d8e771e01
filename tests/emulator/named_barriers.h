// Barriers 1 to 15 of a block, at which some of its warps meet.
#pragma once

#include <array>
#include <cstdint>

#include "order.h"
#include "report.h"
#include "waiting.h"

namespace jvp_attn::emulator {

class NamedBarrier : public Awaited {
public:
    void start_block(int number);

    // A warp comes. Returns whether it was the last that so many threads still lacked.
    bool arrive(const Actor& actor, int threads, Order& order);

    uint32_t generation() const { return generation_; }
    // What all knew who came to the latest generation that is complete.
    const Knowledge& released() const { return released_; }
    std::string state() const override;

private:
    int number_ = 0;
    int threads_ = 0;  // that the present generation needs
    int arrived_ = 0;
    uint32_t warps_ = 0;  // that have come, a bit each
    uint32_t generation_ = 0;
    Knowledge gathered_, released_;
};

class NamedBarriers {
public:
    void start_block();
    NamedBarrier& at(const Actor& actor, int number);

private:
    std::array<NamedBarrier, 16> barriers_;
};

}  // namespace jvp_attn::emulator
