// Threads that live as long as one call: nothing is left that could spin beside torch's own, or that
// a fork would lose.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace jvp_attn::cpu {

// Run all pieces of `Work(arguments).run(piece)`, each thread with a Work of its own.
template <class Work, class Arguments>
void run_in_threads(const Arguments& arguments, int64_t pieces, int threads) {
    std::atomic<int64_t> next{0};
    std::mutex failing;
    std::exception_ptr failure;
    const auto run = [&] {
        try {
            Work work(arguments);
            for (int64_t piece; (piece = next++) < pieces;) work.run(piece);
        } catch (...) {
            const std::lock_guard lock(failing);
            failure = std::current_exception();
            next = pieces;
        }
    };
    std::vector<std::thread> others;
    for (int i = 1; i < threads && i < pieces; ++i) others.emplace_back(run);
    run();
    for (std::thread& thread : others) thread.join();
    if (failure) std::rethrow_exception(failure);
}

}  // namespace jvp_attn::cpu
