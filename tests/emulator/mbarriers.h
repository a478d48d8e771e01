// Barriers in shared memory (mbarrier), which count arriving threads and bytes that TMA copies.
#pragma once

#include <cstdint>
#include <map>

#include "happens_before.h"
#include "report.h"
#include "shared_memory.h"
#include "waitable.h"

namespace jvp_attn::emulator {

class Mbarrier : public Waitable {
public:
    Mbarrier(SharedAddress address, int arrivals, int thread, int agent)
        : address_(address),
          arrivals_(arrivals),
          missing_arrivals_(arrivals),
          thread_(thread),
          agent_(agent) {}

    // Each returns whether it completes the phase.
    bool arrive(const Actor& actor, int bytes, HappensBefore& order);
    bool count_copy(const Actor& actor, int bytes);

    bool has_ended(int phase) const { return (ended_ & 1) != static_cast<uint32_t>(phase); }
    // A thread has waited for all phases that have ended.
    void note_wait() { waited_ = ended_; }
    // The clocks of the threads that arrived in phases that have ended, and of the copies.
    const VectorClocks& released() const { return released_; }

    // The copies that report here are an agent; those of one phase are one operation.
    int agent() const { return agent_; }
    uint32_t operation() const { return ended_ + 1; }

    SharedAddress address() const { return address_; }
    int thread() const { return thread_; }  // that initialized it
    // An error if the block ends before the expected bytes, or before a thread has waited for them.
    void check_finished() const;
    std::string state() const override;

private:
    bool end_phase_if_complete();

    SharedAddress address_;
    int arrivals_;
    int missing_arrivals_;
    int64_t missing_bytes_ = 0;
    int thread_;
    int agent_;
    uint32_t ended_ = 0;        // phases that have ended
    uint32_t waited_ = 0;       // phases that threads have waited for
    uint32_t last_copies_ = 0;  // the last phase with copies, the first being 1
    VectorClocks gathered_, released_;
    Actor last_copy_ = {};  // or arrival that expects one
};

class Mbarriers {
public:
    void start_block() { barriers_.clear(); }

    void init(const Actor& actor, SharedAddress address, int arrivals, SharedMemory& shared,
              HappensBefore& order);

    // The mbarrier at an address; an error if there is none.
    Mbarrier& at(const Actor& actor, SharedAddress address, SharedMemory& shared);

    // The same for the TMA, which needs a fence_mbarrier_init after the init.
    void make_visible(int thread);
    Mbarrier& at_for_tma(const Actor& actor, SharedAddress address, SharedMemory& shared);

    void check_finished() const;

private:
    struct Entry {
        Mbarrier barrier;
        bool visible;
    };
    std::map<SharedAddress, Entry> barriers_;
};

}  // namespace jvp_attn::emulator
