// Barriers in shared memory, for threads that arrive and bytes that the TMA brings.
#pragma once

#include <cstdint>
#include <map>

#include "order.h"
#include "report.h"
#include "shared_memory.h"
#include "waiting.h"

namespace jvp_attn::emulator {

class Mbarrier : public Awaited {
public:
    Mbarrier(SharedAddress address, int arrivals, int thread, int agent)
        : address_(address),
          arrivals_(arrivals),
          missing_arrivals_(arrivals),
          thread_(thread),
          agent_(agent) {}

    // Each returns whether it has ended the phase.
    bool arrive(const Actor& actor, int bytes, Order& order);
    bool count_copy(const Actor& actor, int bytes);

    bool has_ended(int phase) const { return (ended_ & 1) != static_cast<uint32_t>(phase); }
    // Somebody has waited for all phases that have ended.
    void note_wait() { waited_ = ended_; }
    // What those knew who arrived in phases that have ended, and that their copies are over.
    const Knowledge& released() const { return released_; }

    // The copies that report here are an agent, those of the present phase one deed of it.
    int agent() const { return agent_; }
    uint32_t deed() const { return ended_ + 1; }

    SharedAddress address() const { return address_; }
    int thread() const { return thread_; }  // that has initialised it
    // A block must not end before the bytes that it expects, nor before somebody has waited for
    // them.
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
    uint32_t ended_ = 0;        // phases
    uint32_t waited_ = 0;       // of those
    uint32_t last_copies_ = 0;  // the last phase with copies, the first being 1
    Knowledge gathered_, released_;
    Actor last_copy_ = {};  // or expectation of one
};

class Mbarriers {
public:
    void start_block() { barriers_.clear(); }

    void init(const Actor& actor, SharedAddress address, int arrivals, SharedMemory& shared,
              Order& order);

    // Checks that the thread may use what is there.
    Mbarrier& at(const Actor& actor, SharedAddress address, SharedMemory& shared);

    // The same for the TMA, which sees no mbarrier before it was shown to it.
    void show(int thread);
    Mbarrier& at_in_background(const Actor& actor, SharedAddress address, SharedMemory& shared);

    void check_finished() const;

private:
    struct Entry {
        Mbarrier barrier;
        bool shown;
    };
    std::map<SharedAddress, Entry> barriers_;
};

}  // namespace jvp_attn::emulator
