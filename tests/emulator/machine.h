// The emulated machine: it runs a grid of blocks, one after another, a fiber for each thread.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <functional>
#include <optional>
#include <string>

#include "collective.h"
#include "copies.h"
#include "current.h"
#include "fiber.h"
#include "global_memory.h"
#include "scheduler.h"
#include "shared_memory.h"

namespace jvp_attn::emulator {

class Machine {
public:
    SharedMemory shared;
    GlobalMemory global;

    // The orders of blocks and threads in all further launches.
    void set_seed(uint64_t seed) { seed_ = seed; }

    // Calls the kernel once in each thread of each block. Returns what rule was broken, if any.
    std::string run(int blocks, int threads, std::size_t shared_bytes,
                    std::function<void()> kernel);

    // The running thread comes to a collective, and goes on when it is done.
    void meet(const Collective& collective, void* arguments, const Place& where);

    Copies& copies() { return threads_[current.thread].copies; }

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
        bool ended = false;
    };

    static void run_thread();
    void run_block(std::size_t shared_bytes);
    bool join(Meeting& meeting, uint32_t bit, uint32_t all, const Collective& collective,
              const Place& where);
    void conduct(const Collective& collective, int first_thread, int threads);
    void run_another();
    bool waits_at(const Meeting& meeting, int thread) const;
    std::string describe_deadlock() const;
    [[noreturn]] void complain_of_steps(const Actor& actor) const;

    uint64_t seed_ = 0;
    std::function<void()> kernel_;
    int thread_count_ = 0;
    std::deque<Thread> threads_;  // kept from launch to launch, with their stacks
    std::optional<Fiber> caller_;
    std::optional<Scheduler> scheduler_;
    std::array<Meeting, kMaxWarps> warps_;
    Meeting block_;
    std::array<void*, kWarpThreads * kMaxWarps> arguments_;
    std::string error_;
    uint64_t steps_ = 0;
};

extern Machine machine;

}  // namespace jvp_attn::emulator
