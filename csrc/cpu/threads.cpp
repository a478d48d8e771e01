// The threads are those of OpenMP that torch computes with. Any others would have to share the
// processors with these, which go on turning for a while when their work is done. Which OpenMP that
// is, the process knows: torch lets all of it see its own.
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

// What GNU's compiler makes of `#pragma omp parallel`; other OpenMPs have it too.
using Parallel = void (*)(void (*work)(void*), void* argument, unsigned threads, unsigned flags);

// Whether this process runs the program of the one that forked it (Linux: proc(5), stat, flags).
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

// None in a fork: it lacks these threads, and OpenMP, which does not know, would wait for them.
Parallel parallel =
    is_fork() ? nullptr : reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));

[[maybe_unused]] const int none_in_later_forks =
    pthread_atfork(nullptr, nullptr, [] { parallel = nullptr; });

}  // namespace

void call_in_threads(int threads, void (*work)(void*), void* argument) {
    if (threads > 1 && parallel) return parallel(work, argument, threads, 0);
    std::vector<std::thread> others;
    others.reserve(std::max(threads, 0));
    try {
        for (int i = 1; i < threads; ++i) others.emplace_back(work, argument);
    } catch (const std::system_error&) {
        // The system has no more threads: those that there are do the work.
    }
    work(argument);
    for (std::thread& thread : others) thread.join();
}

}  // namespace jvp_attn::cpu
