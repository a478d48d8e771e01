#include "mbarriers.h"

#include <string>

namespace jvp_attn::emulator {

namespace {

constexpr int kBarrierBytes = 8;
constexpr int kMaxArrivals = (1 << 20) - 1;
constexpr int kMaxBytes = (1 << 20) - 1;  // that a phase can expect at a time

}  // namespace

bool Mbarrier::arrive(const Actor& actor, int bytes, HappensBefore& order) {
    if (missing_arrivals_ == 0)
        fail(actor, "arrives at " + state() + ": all arrivals of the phase have happened");
    if (bytes < 0 || missing_bytes_ + bytes > kMaxBytes)
        fail(actor, "expects " + std::to_string(bytes) + " bytes at " + state() +
                        "; there can be 0 to " + std::to_string(kMaxBytes));
    if (bytes > 0) last_copy_ = actor;
    --missing_arrivals_;
    missing_bytes_ += bytes;
    order.release(actor.thread, gathered_);
    return end_phase_if_complete();
}

bool Mbarrier::count_copy(const Actor& actor, int bytes) {
    missing_bytes_ -= bytes;
    last_copy_ = actor;
    last_copies_ = operation();
    return end_phase_if_complete();
}

bool Mbarrier::end_phase_if_complete() {
    if (missing_arrivals_ > 0 || missing_bytes_ != 0) return false;
    missing_arrivals_ = arrivals_;
    ++ended_;
    gathered_.generic.raise(agent_, ended_);
    released_.join(gathered_);
    return true;
}

void Mbarrier::check_finished() const {
    if (missing_bytes_ != 0) fail(last_copy_, "the block ends with " + state());
    if (last_copies_ > waited_)
        fail(last_copy_, "the block ends, and no thread has waited for the bytes of " + state());
}

std::string Mbarrier::state() const {
    std::string text = "the mbarrier at " + text_of(address_) + ", in phase " +
                       std::to_string(ended_ & 1) + " with " +
                       std::to_string(arrivals_ - missing_arrivals_) + " of " +
                       std::to_string(arrivals_) + " arrivals";
    if (missing_bytes_ > 0) text += " and " + std::to_string(missing_bytes_) + " bytes missing";
    if (missing_bytes_ < 0) text += " and " + std::to_string(-missing_bytes_) + " unexpected bytes";
    return text;
}

void Mbarriers::init(const Actor& actor, SharedAddress address, int arrivals, SharedMemory& shared,
                     HappensBefore& order) {
    if (arrivals < 1 || arrivals > kMaxArrivals)
        fail(actor, std::to_string(arrivals) + " arrivals; there can be 1 to " +
                        std::to_string(kMaxArrivals));
    shared.write(actor, address, kBarrierBytes);
    const Mbarrier barrier(address, arrivals, actor.thread, order.add_agent());
    if (!barriers_.emplace(address, Entry{barrier, false}).second)
        fail(actor, "there is " + barriers_.at(address).barrier.state() + " already");
}

Mbarrier& Mbarriers::at(const Actor& actor, SharedAddress address, SharedMemory& shared) {
    const auto entry = barriers_.find(address);
    if (entry == barriers_.end()) fail(actor, "there is no mbarrier at " + text_of(address));
    shared.read(actor, address, kBarrierBytes);
    return entry->second.barrier;
}

void Mbarriers::make_visible(int thread) {
    for (auto& [address, entry] : barriers_)
        if (entry.barrier.thread() == thread) entry.visible = true;
}

Mbarrier& Mbarriers::at_for_tma(const Actor& actor, SharedAddress address, SharedMemory& shared) {
    Mbarrier& barrier = at(actor, address, shared);
    if (!barriers_.at(address).visible)
        fail(actor, "uses " + barrier.state() + ", with no fence_mbarrier_init by thread " +
                        std::to_string(barrier.thread()) + " since its mbarrier_init");
    return barrier;
}

void Mbarriers::check_finished() const {
    for (const auto& [address, entry] : barriers_) entry.barrier.check_finished();
}

}  // namespace jvp_attn::emulator
