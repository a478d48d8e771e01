// A warpgroup: four warps, and the asynchronous products (wgmma) that they issue together.
//
// A wgmma is performed when the first thread waits for it, so that operands that change in between
// give a wrong result.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <span>
#include <vector>

#include "happens_before.h"
#include "report.h"
#include "shared_memory.h"
#include "waitable.h"
#include "wgmma.h"
#include "wgmma_registers.h"

namespace jvp_attn::emulator {

// The arguments of a thread.
struct WgmmaArguments {
    Actor actor;
    WgmmaOp product;
    std::span<float> accumulator;
    const uint32_t* a;  // null if A is in shared memory
};

class Warpgroup : public Waitable {
public:
    static constexpr int kWarps = 4;
    static constexpr int kThreads = 32 * kWarps;

    void start_block(int first_thread, int agent);
    WgmmaRegisters& registers(int thread) { return registers_[thread % kThreads]; }

    // All lanes of a warp issue a wgmma. Returns whether all four warps have.
    bool start(std::span<const WgmmaArguments* const> lanes, const HappensBefore& order,
               SharedMemory& shared);
    void commit(int warp);

    // The number of wgmmas that a warp waits for if `pending` groups may remain in flight.
    uint32_t wgmmas_before(int warp, int pending) const;
    bool have_started(uint32_t products) const;
    // A thread waits for the first `products` wgmmas, all of which have been issued.
    void finish(int thread, uint32_t products, HappensBefore& order, const SharedMemory& shared);

    std::string state() const override;

private:
    struct Started {
        Actor actor = {};
        WgmmaOp product = {};
        int warps = 0;        // that have issued it
        VectorClocks clocks;  // of all its threads
        std::vector<SharedAddress> a, b;
        std::array<WgmmaThread, kThreads> threads;
        std::array<const float*, kThreads> accumulators;
        std::array<std::array<uint32_t, 4>, kThreads> fragments;
    };

    void check_operands(uint32_t number, const HappensBefore& order, SharedMemory& shared);
    void perform_first(const SharedMemory& shared);

    int first_thread_ = 0;
    int agent_ = 0;
    std::array<WgmmaRegisters, kThreads> registers_;
    std::array<uint32_t, kWarps> started_ = {};                 // by warp
    std::array<std::vector<uint32_t>, kWarps> ends_of_groups_;  // by warp
    std::deque<Started> products_;                              // not yet performed
    uint32_t performed_ = 0;
};

}  // namespace jvp_attn::emulator
