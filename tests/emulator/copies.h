// The copies from global to shared memory that a thread has under way, in groups.
//
// The machine may move the data at any time between the issue and the end of the wait. Here they
// are read at the wait: of all moments the one that shows a source that changes meanwhile, and a
// wait that is missing leaves nothing but an error.
#pragma once

#include <vector>

#include "global_memory.h"
#include "report.h"
#include "shared_memory.h"

namespace jvp_attn::emulator {

class Copies {
public:
    // `bytes` of 16 come from the source, the rest are zeros.
    void issue(const Actor& actor, SharedAddress target, const void* source, int bytes,
               SharedMemory& shared, const GlobalMemory& global);

    // Closes the open group, perhaps an empty one.
    void commit() { ++open_group_; }

    // Completes all closed groups but the latest `pending`.
    void wait(int pending, SharedMemory& shared);

    void forget_all();

    // A thread must not end before its copies.
    void check_finished(int thread) const;

private:
    struct Copy {
        SharedAddress target;
        const void* source;
        int bytes;
        int group;
        Place where;
    };

    std::vector<Copy> copies_;  // in the order of their issue
    int open_group_ = 0;        // groups have numbers from 0
};

}  // namespace jvp_attn::emulator
