// What a thread can wait for other than a collective of its warp or block.
#pragma once

#include <string>
#include <vector>

namespace jvp_attn::emulator {

class Awaited {
public:
    virtual ~Awaited() = default;

    // For the report of a deadlock: "the mbarrier at shared_memory() + 8, which ...".
    virtual std::string state() const = 0;

    std::vector<int> waiting;  // threads
};

}  // namespace jvp_attn::emulator
