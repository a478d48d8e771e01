// The copies from global to shared memory (cp.async) that a thread has in flight, in groups.
//
// A GPU may move the data at any time between the issue and the end of the wait. The emulator reads
// them at the wait, so that a source that changes in between gives a wrong result.
#pragma once

#include <vector>

#include "global_memory.h"
#include "report.h"
#include "shared_memory.h"

namespace jvp_attn::emulator {

class AsyncCopies {
public:
    // `bytes` of 16 come from the source, the rest are zeros.
    void issue(const Actor& actor, SharedAddress target, const void* source, int bytes,
               SharedMemory& shared, const GlobalMemory& global);

    // Closes the open group, which may be empty.
    void commit() { ++open_group_; }

    // Completes all closed groups but the latest `pending`.
    void wait(int pending, SharedMemory& shared);

    void forget_all();

    // An error if the thread ends while copies are in flight.
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
