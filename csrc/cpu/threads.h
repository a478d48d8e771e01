// Work for several threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>

namespace jvp_attn::cpu {

// Call `work(argument)` in so many threads at the same time, or in fewer where there are no more.
void call_in_threads(int threads, void (*work)(void*), void* argument);

// As many threads as are wanted, if each has so much to do that waking it pays.
inline int threads_worth_waking(double operations, int wanted) {
    constexpr double kOperationsOfThread = 4e6;
    return static_cast<int>(std::clamp(operations / kOperationsOfThread, 1., double(wanted)));
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
            Worker worker(arguments);
            for (int64_t piece; (piece = next++) < pieces;) worker.run(piece);
        } catch (...) {
            const std::lock_guard lock(failing);
            failure = std::current_exception();
            next = pieces;
        }
    };
    using Run = decltype(run);
    call_in_threads(
        static_cast<int>(std::min<int64_t>(threads, pieces)),
        [](void* run) { (*static_cast<Run*>(run))(); }, &run);
    if (failure) std::rethrow_exception(failure);
}

}  // namespace jvp_attn::cpu
