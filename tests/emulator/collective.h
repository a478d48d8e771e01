// Instructions that all threads of a warp or block execute together, and their rendezvous.
#pragma once

#include <cstdint>
#include <cstring>
#include <span>

#include "report.h"

namespace jvp_attn::emulator {

struct Collective {
    const char* name;
    bool of_block;  // else of a warp
    // Reads the arguments of all threads, in their order, and writes each thread's result.
    void (*perform)(std::span<void* const> arguments);
};

// The argument of a thread.
template <class Argument>
Argument& of_thread(std::span<void* const> arguments, std::size_t thread) {
    return *static_cast<Argument*>(arguments[thread]);
}

// For a collective that only synchronizes.
inline void do_nothing(std::span<void* const>) {}

// The collective that the first thread to arrive executes. All others must execute the same one, at
// the same line of the kernel.
struct Rendezvous {
    const Collective* collective = nullptr;
    Place where;
    uint32_t arrived = 0;  // one bit for each lane, or for each warp

    bool is_for(const Collective& other, const Place& place) const {
        return collective == &other && where.line() == place.line() &&
               (where.file_name() == place.file_name() ||
                std::strcmp(where.file_name(), place.file_name()) == 0);
    }
};

}  // namespace jvp_attn::emulator
