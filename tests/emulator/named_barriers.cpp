#include "named_barriers.h"

#include <string>

#include "scheduler.h"

namespace jvp_attn::emulator {

void NamedBarrier::start_block(int number) {
    *this = NamedBarrier();
    number_ = number;
}

bool NamedBarrier::arrive(const Actor& actor, int threads, HappensBefore& order) {
    const std::string name = "barrier " + std::to_string(number_);
    if (threads < kWarpThreads || threads % kWarpThreads != 0)
        fail(actor, name + " with " + std::to_string(threads) + " threads; it takes whole warps");
    if (arrived_ > 0 && threads != threads_)
        fail(actor, name + " with " + std::to_string(threads) + " threads, but other warps with " +
                        std::to_string(threads_));
    const int warp = actor.thread / kWarpThreads;
    if (warps_ >> warp & 1)
        fail(actor, "the warp has already arrived at " + name + ", which still waits for others");

    threads_ = threads;
    last_ = actor;
    arrived_ += kWarpThreads;
    warps_ |= uint32_t{1} << warp;
    for (int lane = 0; lane < kWarpThreads; ++lane)
        order.release(warp * kWarpThreads + lane, gathered_);
    if (arrived_ < threads_) return false;

    arrived_ = 0;
    warps_ = 0;
    ++generation_;
    released_.join(gathered_);
    return true;
}

void NamedBarrier::check_finished() const {
    if (arrived_ > 0) fail(last_, "the block ends with " + state());
}

std::string NamedBarrier::state() const {
    return "barrier " + std::to_string(number_) + ", at which " + std::to_string(arrived_) +
           " of " + std::to_string(threads_) + " threads have arrived";
}

void NamedBarriers::start_block() {
    for (int i = 0; i < std::ssize(barriers_); ++i) barriers_[i].start_block(i);
}

void NamedBarriers::check_finished() const {
    for (const NamedBarrier& barrier : barriers_) barrier.check_finished();
}

NamedBarrier& NamedBarriers::at(const Actor& actor, int number) {
    if (number < 1 || number >= std::ssize(barriers_))
        fail(actor, "barrier " + std::to_string(number) + "; it can be 1 to 15");
    return barriers_[number];
}

}  // namespace jvp_attn::emulator
