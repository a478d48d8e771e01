// Which accesses to shared memory come before which: the order that barriers and waits make.
//
// An agent is a thread, or what works for threads in the background: the tensor cores of a
// warpgroup, the copies that report to an mbarrier, those of a thread out of shared memory. Each
// counts its deeds. Of each agent a thread knows up to which deed all is over, and at barriers it
// hands on what it knows.
//
// The background reaches shared memory on a path of its own, the asynchronous proxy. There a
// thread's loads and stores count as over only up to that thread's last fence_proxy_async.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "report.h"

namespace jvp_attn::emulator {

// Of each agent, how many of its deeds.
class Clock {
public:
    uint32_t of(int agent) const { return agent < std::ssize(counts_) ? counts_[agent] : 0; }
    void raise(int agent, uint32_t count);
    // The later, or the earlier, of both.
    void join(const Clock& other);
    void meet(const Clock& other);

private:
    std::vector<uint32_t> counts_;  // 0 beyond its end
};

struct Knowledge {
    Clock over;
    Clock over_in_background;  // of threads; what the background did needs no fence

    void join(const Knowledge& other);
    void meet(const Knowledge& other);
};

// An access to a word of shared memory, the count-th deed of an agent.
struct Access {
    uint32_t epoch = 0;
    uint32_t count = 0;
    int agent = 0;
    Actor actor = {};  // the thread that did it or had it done
};

// Who makes an access, and what must be known to be over before it.
struct Observer {
    const Knowledge& knowledge;
    bool in_background;
};

class Order {
public:
    // A block none of whose accesses has been. Where nothing works in the background, a block
    // barrier ends all that was, and that is quicker to see.
    void start_block(int threads, bool has_background);

    int add_agent() { return agents_++; }
    bool is_thread(int agent) const { return agent < std::ssize(threads_); }

    const Knowledge& of_thread(int thread) const { return threads_[thread]; }

    // The thread's next access.
    Access access(const Actor& actor) const {
        return {epoch_, threads_[actor.thread].over.of(actor.thread), actor.thread, actor};
    }
    Access access(const Actor& actor, int agent, uint32_t count) const {
        return {epoch_, count, agent, actor};
    }
    Observer observer(const Actor& actor, bool in_background = false) const {
        return {threads_[actor.thread], in_background};
    }

    // The thread hands on all that it knows and has done, or takes what was handed on.
    void release(int thread, Knowledge& to);
    void acquire(int thread, const Knowledge& from);
    void learn(int thread, int agent, uint32_t count);
    void fence(int thread);
    void block_barrier();

    bool is_settled(const Access& access) const { return access.epoch <= settled_; }
    bool is_over(const Access& access, const Observer& observer) const {
        return is_settled(access) || is_known_to_be_over(access, observer);
    }

private:
    bool is_known_to_be_over(const Access& access, const Observer& observer) const;
    void tick(int thread);

    std::vector<Knowledge> threads_;
    int agents_ = 0;
    bool has_background_ = false;
    // Counted on from block to block, so that what a former block did is over.
    uint32_t epoch_ = 0;
    uint32_t settled_ = 0;  // all accesses up to this epoch are over for everyone
};

}  // namespace jvp_attn::emulator
