// The emulated machine: it runs a grid of blocks, one after another, a fiber for each thread.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <functional>
#include <optional>
#include <string>

#include "box_loads.h"
#include "collective.h"
#include "copies.h"
#include "current.h"
#include "fiber.h"
#include "global_memory.h"
#include "mbarriers.h"
#include "named_barriers.h"
#include "order.h"
#include "register_pool.h"
#include "scheduler.h"
#include "shared_memory.h"
#include "waiting.h"
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
    Order order;
    SharedMemory shared{order};
    GlobalMemory global;
    NamedBarriers named_barriers;
    Mbarriers mbarriers;
    BoxLoads box_loads;
    RegisterPool registers;

    // The orders of blocks and threads in all further launches.
    void set_seed(uint64_t seed) { seed_ = seed; }

    // What the host is told of the machine: its compute capability, 90 for 9.0 ...
    void set_capability(int capability) { capability_ = capability; }
    int capability() const { return capability_; }

    // ... and so few multiprocessors that a block of a persistent kernel has several pieces of
    // work; how many differs from seed to seed.
    int multiprocessors() const { return static_cast<int>(2 + seed_ % 3); }

    // Calls the kernel once in each thread of each block. Returns what rule was broken, if any.
    std::string run(Launch launch);

    // The running thread comes to a collective, and goes on when it is done.
    void meet(const Collective& collective, void* arguments, const Place& where);

    // The running thread waits until somebody wakes those who wait for the same.
    void wait_for(Awaited& awaited, const Actor& actor);
    void wake(Awaited& awaited);

    Copies& copies() { return threads_[current.thread].copies; }
    Warpgroup& warpgroup_of(int thread) { return warpgroups_[thread / Warpgroup::kThreads]; }

    // The lane of each warp that elect_one chooses.
    int elected_lane() const { return elected_lane_; }

    // Counts what the threads of a block do, to find one that waits for ever.
    void count_step(const Actor& actor) {
        if (++steps_ > kMaxSteps) complain_of_steps(actor);
    }

private:
    static constexpr uint64_t kMaxSteps = uint64_t{1} << 27;  // in a block: seconds

    struct Thread {
        explicit Thread(int number) : fiber(number) {}
        Fiber fiber;
        Copies copies;
        const Awaited* awaited = nullptr;
        Actor waiting_actor = {};
        bool ended = false;
    };

    static void run_thread();
    void run_block();
    void end_thread();
    bool join(Meeting& meeting, uint32_t bit, uint32_t all, const Collective& collective,
              const Place& where);
    void conduct(const Collective& collective, int first_thread, int threads);
    void run_another();
    void let_background_work();
    bool waits_at(const Meeting& meeting, int thread) const;
    std::string state_of(int thread) const;
    std::string describe_deadlock() const;
    [[noreturn]] void complain_of_steps(const Actor& actor) const;

    uint64_t seed_ = 0;
    int capability_ = 90;
    Launch launch_ = {};
    std::deque<Thread> threads_;  // kept from launch to launch, with their stacks
    std::optional<Fiber> caller_;
    std::optional<Scheduler> scheduler_;
    std::array<Meeting, kMaxWarps> warps_;
    std::array<Warpgroup, kMaxWarps / Warpgroup::kWarps> warpgroups_;
    Meeting block_;
    std::array<void*, kWarpThreads * kMaxWarps> arguments_;
    int ended_threads_ = 0;
    std::string error_;
    uint64_t steps_ = 0;
    uint64_t background_mask_ = 0;  // at one in so many switches the TMA does something
    int elected_lane_ = 0;
};

extern Machine machine;

}  // namespace jvp_attn::emulator
