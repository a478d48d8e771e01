// The base of what a thread can wait for: barriers, wgmmas, registers.
#pragma once

#include <string>
#include <vector>

namespace jvp_attn::emulator {

class Waitable {
public:
    virtual ~Waitable() = default;

    // For the report of a deadlock: "the mbarrier at shared_memory() + 8, which ...".
    virtual std::string state() const = 0;

    std::vector<int> waiting;  // threads
};

}  // namespace jvp_attn::emulator
