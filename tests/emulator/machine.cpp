#include "machine.h"

#include <algorithm>
#include <exception>
#include <numeric>
#include <utility>
#include <vector>

namespace jvp_attn::emulator {

namespace {

constexpr std::size_t kMaxSharedBytes = 163 * 1024;  // of a block, at compute capability 8.0

std::vector<int> shuffled(int count, Random& random) {
    std::vector<int> order(count);
    std::iota(order.begin(), order.end(), 0);
    for (int i = count - 1; i > 0; --i) std::swap(order[i], order[random.next() % (i + 1)]);
    return order;
}

}  // namespace

Machine machine;

std::string Machine::run(int blocks, int threads, std::size_t shared_bytes,
                         std::function<void()> kernel) {
    if (threads < 1 || threads > kWarpThreads * kMaxWarps || threads % kWarpThreads != 0)
        return "a block of " + std::to_string(threads) +
               " threads; it can have 1 to 32 whole warps of 32";
    if (shared_bytes > kMaxSharedBytes)
        return std::to_string(shared_bytes) + " bytes of shared memory; a block can have " +
               std::to_string(kMaxSharedBytes);

    kernel_ = std::move(kernel);
    thread_count_ = threads;
    while (std::ssize(threads_) < threads) threads_.emplace_back(std::ssize(threads_));
    caller_.emplace();
    scheduler_.emplace(seed_);
    global.start_launch();
    error_.clear();
    for (const int block : shuffled(blocks, scheduler_->random())) {
        current.block = block;
        run_block(shared_bytes);
        if (!error_.empty()) break;
    }
    return error_;
}

void Machine::run_block(std::size_t shared_bytes) {
    shared.start_block(shared_bytes);
    block_ = {};
    warps_.fill({});
    steps_ = 0;
    for (int i = 0; i < thread_count_; ++i) {
        threads_[i].fiber.start(&Machine::run_thread);
        threads_[i].copies.forget_all();
        threads_[i].ended = false;
    }
    scheduler_->start_block(thread_count_ / kWarpThreads);

    current.thread = scheduler_->next();
    caller_->switch_to(threads_[current.thread].fiber);

    // Nothing can run any more: all is done, or something is wrong.
    if (error_.empty()) error_ = describe_deadlock();
}

void Machine::run_thread() {
    Machine& self = machine;
    Thread& thread = self.threads_[current.thread];
    try {
        self.kernel_();
        thread.copies.check_finished(current.thread);
        thread.ended = true;
    } catch (const std::exception& exception) {
        self.error_ = exception.what();
    }
    if (self.error_.empty())
        self.run_another();
    else
        thread.fiber.switch_to(*self.caller_);
}

void Machine::run_another() {
    Thread& self = threads_[current.thread];
    const int next = scheduler_->next();
    if (next == current.thread) return;
    if (next < 0) {
        self.fiber.switch_to(*caller_);
    } else {
        current.thread = next;
        self.fiber.switch_to(threads_[next].fiber);
    }
}

void Machine::meet(const Collective& collective, void* arguments, const Place& where) {
    count_step({current.thread, collective.name, where});
    arguments_[current.thread] = arguments;
    const int warp = current.thread / kWarpThreads;
    const uint32_t lane_bit = uint32_t{1} << current.thread % kWarpThreads;
    if (join(warps_[warp], lane_bit, kAllLanes, collective, where)) {
        const uint32_t all_warps = kAllLanes >> (kMaxWarps - thread_count_ / kWarpThreads);
        if (!collective.of_block)
            conduct(collective, warp * kWarpThreads, kWarpThreads);
        else if (join(block_, uint32_t{1} << warp, all_warps, collective, where))
            conduct(collective, 0, thread_count_);
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
            list_of_threads(thread_count_, [&](int i) { return waits_at(meeting, i); });
        const std::string group = &meeting == &block_ ? "block" : "warp";
        fail({current.thread, collective.name, where},
             "must be executed by all of the " + group + ", but " + others + " came to " +
                 meeting.collective->name + " (" + text(meeting.where) + ")");
    }
    meeting.arrived |= bit;
    return meeting.arrived == all;
}

// All have come: do it, and let them go.
void Machine::conduct(const Collective& collective, int first_thread, int threads) {
    collective.perform({&arguments_[first_thread], static_cast<std::size_t>(threads)});
    if (collective.of_block) {
        block_.arrived = 0;
        shared.barrier();
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

// Empty if there is none: all threads have ended.
std::string Machine::describe_deadlock() const {
    std::vector<std::string> states;
    bool some_wait = false;
    for (int i = 0; i < thread_count_; ++i) {
        const Meeting& meeting = warps_[i / kWarpThreads];
        if (threads_[i].ended) {
            states.push_back("ended");
        } else {
            states.push_back(std::string("waiting at ") + meeting.collective->name + " (" +
                             text(meeting.where) + ")");
            some_wait = true;
        }
    }
    if (!some_wait) return "";

    std::string report = "block " + std::to_string(current.block) + ": deadlock, no thread can run";
    for (int i = 0; i < thread_count_; ++i) {
        const bool told =
            std::find(states.begin(), states.begin() + i, states[i]) != states.begin() + i;
        if (!told)
            report += "; " + states[i] + ": " + list_of_threads(thread_count_, [&](int other) {
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
