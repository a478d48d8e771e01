// Distributes work tiles over threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>

namespace jvp_attn::cpu {

// Calls `work(argument)` in `threads` threads at the same time, or in as many as the system has.
void call_in_threads(int threads, void (*work)(void*), void* argument);

// One thread for little work, else all. Nothing in between: a smaller team would make OpenMP end
// its other threads, and torch would have to start them again.
inline int useful_threads(double operations, int all) {
    constexpr double kWorthwhileOperations = 8e6;
    return operations < kWorthwhileOperations ? 1 : all;
}

// Runs `Worker(arguments).run(work_tile)` for all work tiles, with one Worker per thread. Threads
// take the tiles in ascending order, so a tile may wait for an earlier one. `run` must not throw;
// the constructor of Worker may.
template <class Worker, class Arguments>
void run_in_threads(Arguments& arguments, int64_t work_tiles, int threads) {
    std::atomic<int64_t> next{0};
    std::mutex failing;
    std::exception_ptr failure;
    auto run = [&] {
        try {
            int64_t work_tile = next++;
            if (work_tile >= work_tiles) return;
            Worker worker(arguments);
            for (; work_tile < work_tiles; work_tile = next++) worker.run(work_tile);
        } catch (...) {
            const std::lock_guard lock(failing);
            failure = std::current_exception();
            next = work_tiles;
        }
    };
    using Run = decltype(run);
    call_in_threads(threads, [](void* run) { (*static_cast<Run*>(run))(); }, &run);
    if (failure) std::rethrow_exception(failure);
}

}  // namespace jvp_attn::cpu
