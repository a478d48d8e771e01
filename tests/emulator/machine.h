// The emulated GPU: it runs the blocks of a grid one after another, with a fiber for each thread.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <functional>
#include <optional>
#include <string>

#include "async_copies.h"
#include "collective.h"
#include "current.h"
#include "fiber.h"
#include "global_memory.h"
#include "happens_before.h"
#include "mbarriers.h"
#include "named_barriers.h"
#include "register_pool.h"
#include "scheduler.h"
#include "shared_memory.h"
#include "tma_loads.h"
#include "waitable.h"
#include "warpgroup.h"

namespace jvp_attn::emulator {

struct Launch {
    int blocks;
    int threads;
    std::size_t shared_bytes;
    int capability;  // 80 is 8.0
    std::function<void()> kernel;
};

class Machine {
public:
    HappensBefore order;
    SharedMemory shared{order};
    GlobalMemory global;
    NamedBarriers named_barriers;
    Mbarriers mbarriers;
    TmaLoads tma_loads;
    RegisterPool registers;

    // Determines the order of blocks and threads in later launches.
    void set_seed(uint64_t seed) { seed_ = seed; }

    // The compute capability that the host sees, 90 for 9.0.
    void set_capability(int capability) { capability_ = capability; }
    int capability() const { return capability_; }

    // So few that a block of a persistent kernel has several work tiles; depends on the seed.
    int multiprocessors() const { return static_cast<int>(2 + seed_ % 3); }

    // Runs the kernel in each thread of each block. Returns an error message, or an empty string.
    std::string run(Launch launch);

    // The running thread executes a collective; returns when all its threads have.
    void execute(const Collective& collective, void* arguments, const Place& where);

    // The running thread waits until another one wakes all that wait for the same.
    void wait_for(Waitable& waitable, const Actor& actor);
    void wake(Waitable& waitable);

    AsyncCopies& copies() { return threads_[current.thread].copies; }
    Warpgroup& warpgroup_of(int thread) { return warpgroups_[thread / Warpgroup::kThreads]; }

    // The lane of each warp that elect_one chooses.
    int elected_lane() const { return elected_lane_; }

    // Counts the instructions of a block, to detect endless loops.
    void count_step(const Actor& actor) {
        if (++steps_ > kMaxSteps) report_endless_loop(actor);
    }

private:
    static constexpr uint64_t kMaxSteps = uint64_t{1} << 27;  // of a block; they take seconds

    struct Thread {
        explicit Thread(int number) : fiber(number) {}
        Fiber fiber;
        AsyncCopies copies;
        const Waitable* waitable = nullptr;
        Actor waiting_actor = {};
        bool ended = false;
    };

    static void run_thread();
    void run_block();
    void end_thread();
    bool arrive_at(Rendezvous& rendezvous, uint32_t bit, uint32_t all, const Collective& collective,
                   const Place& where);
    void complete(const Collective& collective, int first_thread, int threads);
    void run_another();
    void run_tma();
    bool waits_at(const Rendezvous& rendezvous, int thread) const;
    std::string state_of(int thread) const;
    std::string describe_deadlock() const;
    [[noreturn]] void report_endless_loop(const Actor& actor) const;

    uint64_t seed_ = 0;
    int capability_ = 90;
    Launch launch_ = {};
    std::deque<Thread> threads_;  // reused by later launches, with their stacks
    std::optional<Fiber> caller_;
    std::optional<Scheduler> scheduler_;
    std::array<Rendezvous, kMaxWarps> warps_;
    std::array<Warpgroup, kMaxWarps / Warpgroup::kWarps> warpgroups_;
    Rendezvous block_;
    std::array<void*, kWarpThreads * kMaxWarps> arguments_;
    int ended_threads_ = 0;
    std::string error_;
    uint64_t steps_ = 0;
    uint64_t tma_mask_ = 0;  // the TMA runs at one in (mask + 1) switches
    int elected_lane_ = 0;
};

extern Machine machine;

}  // namespace jvp_attn::emulator
