// The happens-before relation of accesses to shared memory, by vector clocks.
//
// An agent is a thread, the tensor cores of a warpgroup, or the TMA copies that report to one
// mbarrier. Each counts its operations. The clocks of a thread hold, for each agent, the number of
// operations that happen before the thread's next one. Barriers and waits merge clocks.
//
// Tensor cores and TMA access shared memory through the async proxy. There a thread's loads and
// stores happen before an access only up to that thread's last fence_proxy_async.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "report.h"

namespace jvp_attn::emulator {

// A number of operations for each agent.
class VectorClock {
public:
    uint32_t of(int agent) const { return agent < std::ssize(counts_) ? counts_[agent] : 0; }
    void raise(int agent, uint32_t count);
    // The maximum, or the minimum, for each agent.
    void join(const VectorClock& other);
    void meet(const VectorClock& other);

private:
    std::vector<uint32_t> counts_;  // 0 beyond its end
};

struct VectorClocks {
    VectorClock generic;  // for accesses through the generic proxy
    VectorClock async;    // of threads, for accesses through the async proxy

    void join(const VectorClocks& other);
    void meet(const VectorClocks& other);
};

// An access to a word of shared memory, the count-th operation of an agent.
struct Access {
    uint32_t epoch = 0;
    uint32_t count = 0;
    int agent = 0;
    Actor actor = {};  // the thread that executed the instruction
};

// The clocks and the proxy of an access that is checked.
struct Observer {
    const VectorClocks& clocks;
    bool async_proxy;
};

class HappensBefore {
public:
    // Without an async proxy, all accesses before a block barrier happen before all later ones, so
    // that an epoch replaces the clocks.
    void start_block(int threads, bool has_async_proxy);

    int add_agent() { return agents_++; }
    bool is_thread(int agent) const { return agent < std::ssize(threads_); }

    const VectorClocks& of_thread(int thread) const { return threads_[thread]; }

    // The thread's next access.
    Access access(const Actor& actor) const {
        return {epoch_, threads_[actor.thread].generic.of(actor.thread), actor.thread, actor};
    }
    Access access(const Actor& actor, int agent, uint32_t count) const {
        return {epoch_, count, agent, actor};
    }
    Observer observer(const Actor& actor, bool async_proxy = false) const {
        return {threads_[actor.thread], async_proxy};
    }

    // Merge the thread's clocks into others, or others into the thread's.
    void release(int thread, VectorClocks& to);
    void acquire(int thread, const VectorClocks& from);
    void acquire(int thread, int agent, uint32_t count);
    void fence(int thread);
    void block_barrier();

    bool is_settled(const Access& access) const { return access.epoch <= settled_; }
    bool happens_before(const Access& access, const Observer& observer) const {
        return is_settled(access) || is_in_clocks(access, observer);
    }

private:
    bool is_in_clocks(const Access& access, const Observer& observer) const;
    void tick(int thread);

    std::vector<VectorClocks> threads_;
    int agents_ = 0;
    bool has_async_proxy_ = false;
    // Never reset, so that all accesses of former blocks are settled.
    uint32_t epoch_ = 0;
    uint32_t settled_ = 0;  // all accesses up to this epoch happen before all new ones
};

}  // namespace jvp_attn::emulator
