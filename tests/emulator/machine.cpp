#include "machine.h"

#include <algorithm>
#include <exception>
#include <numeric>
#include <utility>
#include <vector>

namespace jvp_attn::emulator {

namespace {

// Of shared memory, that a block may have.
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
    background_mask_ = switches[random.next() >> 62] - 1;
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
    box_loads.start_block();
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
        threads_[i].awaited = nullptr;
        threads_[i].ended = false;
    }
    scheduler_->start_block(threads / kWarpThreads);

    current.thread = scheduler_->next();
    caller_->switch_to(threads_[current.thread].fiber);

    // Nothing can run any more: all is done, or something is wrong.
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
    if (++ended_threads_ == launch_.threads) mbarriers.check_finished();
    run_another();
}

void Machine::run_another() {
    Thread& self = threads_[current.thread];
    let_background_work();
    const int next = scheduler_->next();
    if (next == current.thread) return;
    if (next < 0) {
        self.fiber.switch_to(*caller_);
    } else {
        current.thread = next;
        self.fiber.switch_to(threads_[next].fiber);
    }
}

// At the latest when no thread can run without it.
void Machine::let_background_work() {
    while (box_loads.any() &&
           (scheduler_->is_idle() || (scheduler_->random().next() >> 32 & background_mask_) == 0))
        if (Mbarrier* barrier = box_loads.land_one(scheduler_->random(), shared)) wake(*barrier);
}

void Machine::wait_for(Awaited& awaited, const Actor& actor) {
    Thread& self = threads_[current.thread];
    awaited.waiting.push_back(current.thread);
    self.awaited = &awaited;
    self.waiting_actor = actor;
    run_another();
    self.awaited = nullptr;
}

void Machine::wake(Awaited& awaited) {
    for (const int thread : awaited.waiting)
        scheduler_->set_runnable(thread / kWarpThreads, uint32_t{1} << thread % kWarpThreads);
    awaited.waiting.clear();
}

void Machine::meet(const Collective& collective, void* arguments, const Place& where) {
    count_step(self(collective.name, where));
    arguments_[current.thread] = arguments;
    const int warp = current.thread / kWarpThreads;
    const uint32_t lane_bit = uint32_t{1} << current.thread % kWarpThreads;
    if (join(warps_[warp], lane_bit, kAllLanes, collective, where)) {
        const uint32_t all_warps = kAllLanes >> (kMaxWarps - launch_.threads / kWarpThreads);
        if (!collective.of_block)
            conduct(collective, warp * kWarpThreads, kWarpThreads);
        else if (join(block_, uint32_t{1} << warp, all_warps, collective, where))
            conduct(collective, 0, launch_.threads);
    }
    run_another();
}

// Returns whether the meeting is complete.
bool Machine::join(Meeting& meeting, uint32_t bit, uint32_t all, const Collective& collective,
                   const Place& where) {
    if (meeting.arrived == 0) {
        meeting.collective = &collective;
        meeting.where = where;
    } else if (!meeting.is_for(collective, where)) {
        const std::string others =
            list_of_threads(launch_.threads, [&](int i) { return waits_at(meeting, i); });
        const std::string group = &meeting == &block_ ? "block" : "warp";
        fail(self(collective.name, where), "must be executed by all of the " + group + ", but " +
                                               others + " came to " + meeting.collective->name +
                                               " (" + text(meeting.where) + ")");
    }
    meeting.arrived |= bit;
    return meeting.arrived == all;
}

// All have come: do it, and let them go.
void Machine::conduct(const Collective& collective, int first_thread, int threads) {
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

bool Machine::waits_at(const Meeting& meeting, int thread) const {
    const int warp = thread / kWarpThreads;
    if (&meeting == &block_) return meeting.arrived >> warp & 1;
    return &meeting == &warps_[warp] && (meeting.arrived >> thread % kWarpThreads & 1);
}

std::string Machine::state_of(int thread) const {
    const Thread& x = threads_[thread];
    if (x.ended) return "ended";
    const std::string waiting = "waiting at ";
    if (x.awaited != nullptr)
        return waiting + x.waiting_actor.instruction + " (" + text(x.waiting_actor.where) +
               ") for " + x.awaited->state();
    const Meeting& meeting = warps_[thread / kWarpThreads];
    return waiting + meeting.collective->name + " (" + text(meeting.where) + ")";
}

// Empty if there is none: all threads have ended.
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

void Machine::complain_of_steps(const Actor& actor) const {
    fail(actor, "the block has taken " + std::to_string(kMaxSteps) +
                    " steps and has not ended: a thread seems to wait for what never comes");
}

}  // namespace jvp_attn::emulator
