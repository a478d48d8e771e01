// Threads that live as long as one call: nothing is left that could spin beside torch's own, or
// that a fork would lose.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace jvp_attn::cpu {

// As many threads as are wanted, if each has so much to do that starting it pays.
inline int threads_worth_starting(double operations, int wanted) {
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
    const auto run = [&] {
        try {
            Worker worker(arguments);
            for (int64_t piece; (piece = next++) < pieces;) worker.run(piece);
        } catch (...) {
            const std::lock_guard lock(failing);
            failure = std::current_exception();
            next = pieces;
        }
    };
    std::vector<std::thread> others;
    others.reserve(std::max(threads, 0));
    try {
        for (int i = 1; i < threads && i < pieces; ++i) others.emplace_back(run);
    } catch (const std::system_error&) {
        // The system has no more threads: those that there are do the work.
    }
    run();
    for (std::thread& thread : others) thread.join();
    if (failure) std::rethrow_exception(failure);
}

}  // namespace jvp_attn::cpu
