// Work runs in the OpenMP threads of torch: these spin-wait after finishing, so threads of our own
// would compete with them for the processors. The symbol is looked up in the process, where torch
// has loaded its OpenMP library.
#include "cpu/threads.h"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <fstream>
#include <sstream>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

namespace jvp_attn::cpu {

namespace {

// The function that GCC calls for `#pragma omp parallel`; LLVM's and Intel's OpenMP export it too.
using Parallel = void (*)(void (*work)(void*), void* argument, unsigned threads, unsigned flags);

// Whether this process was forked and has not called exec since (Linux: proc(5), stat, flags).
bool is_fork() {
    constexpr unsigned kForkedWithoutExec = 0x40;
    std::string text, other;
    std::getline(std::ifstream("/proc/self/stat"), text);
    std::istringstream fields(text.substr(text.rfind(')') + 1));
    for (int before = 0; before < 6; ++before) fields >> other;
    unsigned flags = 0;
    fields >> flags;
    return flags & kForkedWithoutExec;
}

// Null in a forked process: it lacks the threads of its parent, and OpenMP would wait for them.
Parallel parallel =
    is_fork() ? nullptr : reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));

[[maybe_unused]] const int null_in_later_forks =
    pthread_atfork(nullptr, nullptr, [] { parallel = nullptr; });

}  // namespace

void call_in_threads(int threads, void (*work)(void*), void* argument) {
    if (threads > 1 && parallel) return parallel(work, argument, threads, 0);
    std::vector<std::thread> others;
    others.reserve(std::max(threads, 0));
    try {
        for (int i = 1; i < threads; ++i) others.emplace_back(work, argument);
    } catch (const std::system_error&) {
        // The system has no more threads: the existing ones do the work.
    }
    work(argument);
    for (std::thread& thread : others) thread.join();
}

}  // namespace jvp_attn::cpu
