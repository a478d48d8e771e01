#include "machine.h"

#include <algorithm>
#include <exception>
#include <numeric>
#include <utility>
#include <vector>

namespace jvp_attn::emulator {

namespace {

// The most shared memory that a block can have.
std::size_t max_shared_bytes(int capability) { return (capability < 90 ? 163 : 227) * 1024; }

std::vector<int> shuffled(int count, Random& random) {
    std::vector<int> order(count);
    std::iota(order.begin(), order.end(), 0);
    for (int i = count - 1; i > 0; --i) std::swap(order[i], order[random.next() % (i + 1)]);
    return order;
}

}  // namespace

Machine machine;

std::string Machine::run(Launch launch) {
    if (launch.threads < 1 || launch.threads > kWarpThreads * kMaxWarps ||
        launch.threads % kWarpThreads != 0)
        return "a block of " + std::to_string(launch.threads) +
               " threads; it can have 1 to 32 whole warps of 32";
    const std::size_t max_bytes = max_shared_bytes(launch.capability);
    if (launch.shared_bytes > max_bytes)
        return std::to_string(launch.shared_bytes) + " bytes of shared memory; a block can have " +
               std::to_string(max_bytes);

    launch_ = std::move(launch);
    while (std::ssize(threads_) < launch_.threads) threads_.emplace_back(std::ssize(threads_));
    caller_.emplace();
    scheduler_.emplace(seed_);
    Random& random = scheduler_->random();
    constexpr std::array<uint64_t, 4> switches = {1, 16, 256, 1 << 30};
    tma_mask_ = switches[random.next() >> 62] - 1;
    elected_lane_ = static_cast<int>(random.next() % kWarpThreads);
    global.start_launch();
    error_.clear();
    for (const int block : shuffled(launch_.blocks, random)) {
        current.block = block;
        run_block();
        if (!error_.empty()) break;
    }
    return error_;
}

void Machine::run_block() {
    const int threads = launch_.threads;
    order.start_block(threads, launch_.capability >= 90);
    shared.start_block(launch_.shared_bytes);
    named_barriers.start_block();
    mbarriers.start_block();
    tma_loads.start_block();
    registers.start_block(threads);
    for (int first = 0; first < threads; first += Warpgroup::kThreads)
        warpgroup_of(first).start_block(first, order.add_agent());
    block_ = {};
    warps_.fill({});
    steps_ = 0;
    ended_threads_ = 0;
    for (int i = 0; i < threads; ++i) {
        threads_[i].fiber.start(&Machine::run_thread);
        threads_[i].copies.forget_all();
        threads_[i].waitable = nullptr;
        threads_[i].ended = false;
    }
    scheduler_->start_block(threads / kWarpThreads);

    current.thread = scheduler_->next();
    caller_->switch_to(threads_[current.thread].fiber);

    // No thread can run: all have ended, or there is a deadlock.
    if (error_.empty()) error_ = describe_deadlock();
}

void Machine::run_thread() {
    Machine& self = machine;
    try {
        self.launch_.kernel();
        self.end_thread();
    } catch (const std::exception& exception) {
        self.error_ = exception.what();
    }
    self.threads_[current.thread].fiber.switch_to(*self.caller_);
}

void Machine::end_thread() {
    Thread& thread = threads_[current.thread];
    thread.copies.check_finished(current.thread);
    warpgroup_of(current.thread).registers(current.thread).check_finished();
    thread.ended = true;
    if (++ended_threads_ == launch_.threads) {
        mbarriers.check_finished();
        named_barriers.check_finished();
    }
    run_another();
}

void Machine::run_another() {
    Thread& self = threads_[current.thread];
    run_tma();
    const int next = scheduler_->next();
    if (next == current.thread) return;
    if (next < 0) {
        self.fiber.switch_to(*caller_);
    } else {
        current.thread = next;
        self.fiber.switch_to(threads_[next].fiber);
    }
}

// Completes TMA loads at random times, at the latest when no thread can run.
void Machine::run_tma() {
    while (tma_loads.any() &&
           (scheduler_->is_idle() || (scheduler_->random().next() >> 32 & tma_mask_) == 0))
        if (Mbarrier* barrier = tma_loads.complete_one(scheduler_->random(), shared))
            wake(*barrier);
}

void Machine::wait_for(Waitable& waitable, const Actor& actor) {
    Thread& self = threads_[current.thread];
    waitable.waiting.push_back(current.thread);
    self.waitable = &waitable;
    self.waiting_actor = actor;
    run_another();
    self.waitable = nullptr;
}

void Machine::wake(Waitable& waitable) {
    for (const int thread : waitable.waiting)
        scheduler_->set_runnable(thread / kWarpThreads, uint32_t{1} << thread % kWarpThreads);
    waitable.waiting.clear();
}

void Machine::execute(const Collective& collective, void* arguments, const Place& where) {
    count_step(self(collective.name, where));
    arguments_[current.thread] = arguments;
    const int warp = current.thread / kWarpThreads;
    const uint32_t lane_bit = uint32_t{1} << current.thread % kWarpThreads;
    if (arrive_at(warps_[warp], lane_bit, kAllLanes, collective, where)) {
        const uint32_t all_warps = kAllLanes >> (kMaxWarps - launch_.threads / kWarpThreads);
        if (!collective.of_block)
            complete(collective, warp * kWarpThreads, kWarpThreads);
        else if (arrive_at(block_, uint32_t{1} << warp, all_warps, collective, where))
            complete(collective, 0, launch_.threads);
    }
    run_another();
}

// Returns whether the rendezvous is complete.
bool Machine::arrive_at(Rendezvous& rendezvous, uint32_t bit, uint32_t all,
                        const Collective& collective, const Place& where) {
    if (rendezvous.arrived == 0) {
        rendezvous.collective = &collective;
        rendezvous.where = where;
    } else if (!rendezvous.is_for(collective, where)) {
        const std::string others =
            list_of_threads(launch_.threads, [&](int i) { return waits_at(rendezvous, i); });
        const std::string group = &rendezvous == &block_ ? "block" : "warp";
        fail(self(collective.name, where),
             "must be executed by all threads of the " + group + ", but " + others + " came to " +
                 rendezvous.collective->name + " (" + text(rendezvous.where) + ")");
    }
    rendezvous.arrived |= bit;
    return rendezvous.arrived == all;
}

// All threads have arrived: execute the collective, and let them continue.
void Machine::complete(const Collective& collective, int first_thread, int threads) {
    collective.perform({&arguments_[first_thread], static_cast<std::size_t>(threads)});
    if (collective.of_block) {
        block_.arrived = 0;
        order.block_barrier();
    }
    for (int first = first_thread; first < first_thread + threads; first += kWarpThreads) {
        warps_[first / kWarpThreads].arrived = 0;
        scheduler_->set_runnable(first / kWarpThreads);
    }
}

bool Machine::waits_at(const Rendezvous& rendezvous, int thread) const {
    const int warp = thread / kWarpThreads;
    if (&rendezvous == &block_) return rendezvous.arrived >> warp & 1;
    return &rendezvous == &warps_[warp] && (rendezvous.arrived >> thread % kWarpThreads & 1);
}

std::string Machine::state_of(int thread) const {
    const Thread& x = threads_[thread];
    if (x.ended) return "ended";
    const std::string waiting = "waiting at ";
    if (x.waitable != nullptr)
        return waiting + x.waiting_actor.instruction + " (" + text(x.waiting_actor.where) +
               ") for " + x.waitable->state();
    const Rendezvous& rendezvous = warps_[thread / kWarpThreads];
    return waiting + rendezvous.collective->name + " (" + text(rendezvous.where) + ")";
}

// Empty if there is none, since all threads have ended.
std::string Machine::describe_deadlock() const {
    std::vector<std::string> states;
    bool some_wait = false;
    for (int i = 0; i < launch_.threads; ++i) {
        states.push_back(state_of(i));
        some_wait |= !threads_[i].ended;
    }
    if (!some_wait) return "";

    std::string report = "block " + std::to_string(current.block) + ": deadlock, no thread can run";
    for (int i = 0; i < launch_.threads; ++i) {
        const bool told =
            std::find(states.begin(), states.begin() + i, states[i]) != states.begin() + i;
        if (!told)
            report += "; " + states[i] + ": " + list_of_threads(launch_.threads, [&](int other) {
                          return states[other] == states[i];
                      });
    }
    return report;
}

void Machine::report_endless_loop(const Actor& actor) const {
    fail(actor, "the block has taken " + std::to_string(kMaxSteps) +
                    " steps and has not ended: a thread may be in an endless loop");
}

}  // namespace jvp_attn::emulator
