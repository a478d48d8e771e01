#include "order.h"

#include <algorithm>

namespace jvp_attn::emulator {

void Clock::raise(int agent, uint32_t count) {
    if (agent >= std::ssize(counts_)) counts_.resize(agent + 1);
    counts_[agent] = std::max(counts_[agent], count);
}

void Clock::join(const Clock& other) {
    if (counts_.size() < other.counts_.size()) counts_.resize(other.counts_.size());
    const std::size_t size = other.counts_.size();
    for (std::size_t i = 0; i < size; ++i) counts_[i] = std::max(counts_[i], other.counts_[i]);
}

void Clock::meet(const Clock& other) {
    if (counts_.size() > other.counts_.size()) counts_.resize(other.counts_.size());
    const std::size_t size = counts_.size();
    for (std::size_t i = 0; i < size; ++i) counts_[i] = std::min(counts_[i], other.counts_[i]);
}

void Knowledge::join(const Knowledge& other) {
    over.join(other.over);
    over_in_background.join(other.over_in_background);
}

void Knowledge::meet(const Knowledge& other) {
    over.meet(other.over);
    over_in_background.meet(other.over_in_background);
}

void Order::start_block(int threads, bool has_background) {
    threads_.assign(threads, {});
    agents_ = threads;
    has_background_ = has_background;
    settled_ = epoch_++;
    for (int thread = 0; thread < threads; ++thread) threads_[thread].over.raise(thread, 1);
}

// What the thread does from now on is not yet known to anyone else.
void Order::tick(int thread) {
    Clock& over = threads_[thread].over;
    over.raise(thread, over.of(thread) + 1);
}

void Order::release(int thread, Knowledge& to) {
    to.join(threads_[thread]);
    tick(thread);
}

void Order::acquire(int thread, const Knowledge& from) { threads_[thread].join(from); }

void Order::learn(int thread, int agent, uint32_t count) {
    threads_[thread].over.raise(agent, count);
}

void Order::fence(int thread) {
    Knowledge& knowledge = threads_[thread];
    knowledge.over_in_background.raise(thread, knowledge.over.of(thread));
    tick(thread);
}

void Order::block_barrier() {
    ++epoch_;
    if (!has_background_) {
        settled_ = epoch_ - 1;
        return;
    }
    Knowledge all;
    for (const Knowledge& knowledge : threads_) all.join(knowledge);
    for (int thread = 0; thread < std::ssize(threads_); ++thread) {
        acquire(thread, all);
        tick(thread);
    }
}

bool Order::is_known_to_be_over(const Access& access, const Observer& observer) const {
    const Knowledge& knowledge = observer.knowledge;
    const bool needs_fence = observer.in_background && is_thread(access.agent);
    return (needs_fence ? knowledge.over_in_background : knowledge.over).of(access.agent) >=
           access.count;
}

}  // namespace jvp_attn::emulator
