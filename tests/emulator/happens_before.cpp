#include "happens_before.h"

#include <algorithm>

namespace jvp_attn::emulator {

void VectorClock::raise(int agent, uint32_t count) {
    if (agent >= std::ssize(counts_)) counts_.resize(agent + 1);
    counts_[agent] = std::max(counts_[agent], count);
}

void VectorClock::join(const VectorClock& other) {
    if (counts_.size() < other.counts_.size()) counts_.resize(other.counts_.size());
    const std::size_t size = other.counts_.size();
    for (std::size_t i = 0; i < size; ++i) counts_[i] = std::max(counts_[i], other.counts_[i]);
}

void VectorClock::meet(const VectorClock& other) {
    if (counts_.size() > other.counts_.size()) counts_.resize(other.counts_.size());
    const std::size_t size = counts_.size();
    for (std::size_t i = 0; i < size; ++i) counts_[i] = std::min(counts_[i], other.counts_[i]);
}

void VectorClocks::join(const VectorClocks& other) {
    generic.join(other.generic);
    async.join(other.async);
}

void VectorClocks::meet(const VectorClocks& other) {
    generic.meet(other.generic);
    async.meet(other.async);
}

void HappensBefore::start_block(int threads, bool has_async_proxy) {
    threads_.assign(threads, {});
    agents_ = threads;
    has_async_proxy_ = has_async_proxy;
    settled_ = epoch_++;
    for (int thread = 0; thread < threads; ++thread) threads_[thread].generic.raise(thread, 1);
}

// No other clocks include the thread's operations from now on.
void HappensBefore::tick(int thread) {
    VectorClock& generic = threads_[thread].generic;
    generic.raise(thread, generic.of(thread) + 1);
}

void HappensBefore::release(int thread, VectorClocks& to) {
    to.join(threads_[thread]);
    tick(thread);
}

void HappensBefore::acquire(int thread, const VectorClocks& from) { threads_[thread].join(from); }

void HappensBefore::acquire(int thread, int agent, uint32_t count) {
    threads_[thread].generic.raise(agent, count);
}

void HappensBefore::fence(int thread) {
    VectorClocks& clocks = threads_[thread];
    clocks.async.raise(thread, clocks.generic.of(thread));
    tick(thread);
}

void HappensBefore::block_barrier() {
    ++epoch_;
    if (!has_async_proxy_) {
        settled_ = epoch_ - 1;
        return;
    }
    VectorClocks all;
    for (const VectorClocks& clocks : threads_) all.join(clocks);
    for (int thread = 0; thread < std::ssize(threads_); ++thread) {
        acquire(thread, all);
        tick(thread);
    }
}

bool HappensBefore::is_in_clocks(const Access& access, const Observer& observer) const {
    const VectorClocks& clocks = observer.clocks;
    const bool needs_fence = observer.async_proxy && is_thread(access.agent);
    return (needs_fence ? clocks.async : clocks.generic).of(access.agent) >= access.count;
}

}  // namespace jvp_attn::emulator
