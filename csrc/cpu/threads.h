// Work for several threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>

namespace jvp_attn::cpu {

// Call `work(argument)` in so many threads at the same time, or in fewer where there are no more.
void call_in_threads(int threads, void (*work)(void*), void* argument);

// All threads or one: OpenMP ends those that it has and is not asked for, and torch wants them
// back.
inline int threads_worth_waking(double operations, int all) {
    constexpr double kOperationsWorthIt = 8e6;
    return operations < kOperationsWorthIt ? 1 : all;
}

// Run `Worker(arguments).run(piece)` for all pieces, each thread with a Worker of its own. Pieces
// are taken in their order, so that one may wait for an earlier one. Only constructors may throw.
template <class Worker, class Arguments>
void run_in_threads(Arguments& arguments, int64_t pieces, int threads) {
    std::atomic<int64_t> next{0};
    std::mutex failing;
    std::exception_ptr failure;
    auto run = [&] {
        try {
            int64_t piece = next++;
            if (piece >= pieces) return;
            Worker worker(arguments);
            for (; piece < pieces; piece = next++) worker.run(piece);
        } catch (...) {
            const std::lock_guard lock(failing);
            failure = std::current_exception();
            next = pieces;
        }
    };
    using Run = decltype(run);
    call_in_threads(threads, [](void* run) { (*static_cast<Run*>(run))(); }, &run);
    if (failure) std::rethrow_exception(failure);
}

}  // namespace jvp_attn::cpu
