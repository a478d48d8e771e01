// What threads can only do together, and where they meet to do it.
#pragma once

#include <cstdint>
#include <cstring>
#include <span>

#include "report.h"

namespace jvp_attn::emulator {

struct Collective {
    const char* name;
    bool of_block;  // else of a warp
    // Given what each thread brought, in the order of threads, writes each thread's result.
    void (*perform)(std::span<void* const> arguments);
};

// What a thread brought.
template <class Argument>
Argument& of_thread(std::span<void* const> arguments, std::size_t thread) {
    return *static_cast<Argument*>(arguments[thread]);
}

// All that threads may want of a collective is to meet.
inline void do_nothing(std::span<void* const>) {}

// The collective that the first to arrive has come to. All others must come to the same one, from
// the same line of the kernel.
struct Meeting {
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
