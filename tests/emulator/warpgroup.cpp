#include "warpgroup.h"

#include <algorithm>
#include <string>

namespace jvp_attn::emulator {

namespace {

bool same_line(const Place& a, const Place& b) {
    return a.line() == b.line() && std::string_view(a.file_name()) == b.file_name();
}

}  // namespace

void Warpgroup::start_block(int first_thread, int agent) {
    first_thread_ = first_thread;
    agent_ = agent;
    waiting.clear();
    for (WgmmaRegisters& registers : registers_) registers.start_thread();
    started_.fill(0);
    for (auto& ends : ends_of_groups_) ends.clear();
    products_.clear();
    performed_ = 0;
}

bool Warpgroup::start(std::span<const WgmmaArguments* const> lanes, const HappensBefore& order,
                      SharedMemory& shared) {
    const WgmmaArguments& first = *lanes.front();
    const int warp = (first.actor.thread - first_thread_) / 32;
    const uint32_t number = started_[warp]++;
    if (number == performed_ + products_.size()) {
        Started& next = products_.emplace_back();
        next.actor = first.actor;
        next.product = first.product;
        next.clocks = order.of_thread(first.actor.thread);
    }
    Started& product = products_[number - performed_];
    for (const WgmmaArguments* lane : lanes) {
        if (lane->product != product.product || !same_line(lane->actor.where, product.actor.where))
            fail(lane->actor,
                 "must be the same for all threads of the warpgroup, but it differs "
                 "from " +
                     text(product.actor));
        const int thread = lane->actor.thread - first_thread_;
        WgmmaRegisters& registers = registers_[thread];
        registers.start(lane->actor, lane->accumulator, number);
        product.accumulators[thread] = lane->accumulator.data();
        if (lane->a != nullptr) {
            registers.start(lane->actor, WgmmaRegisters::Fragment(lane->a, 4), number);
            std::copy_n(lane->a, 4, product.fragments[thread].begin());
        }
        product.clocks.meet(order.of_thread(lane->actor.thread));
    }
    if (++product.warps < kWarps) return false;
    check_operands(number, order, shared);
    return true;
}

// They may be read from now on, until the wgmma completes.
void Warpgroup::check_operands(uint32_t number, const HappensBefore& order, SharedMemory& shared) {
    Started& started = products_[number - performed_];
    const WgmmaOp& product = started.product;
    if (!product.a_in_registers)
        started.a = operand_chunks(started.actor, product.a, product.major_a, product.kRows);
    started.b = operand_chunks(started.actor, product.b, product.major_b, product.columns);
    const Access access = order.access(started.actor, agent_, number + 1);
    const Observer observer = {started.clocks, true};
    for (const auto* chunks : {&started.a, &started.b})
        for (const SharedAddress chunk : *chunks) shared.read(access, observer, chunk, 16, 16);
}

void Warpgroup::commit(int warp) { ends_of_groups_[warp].push_back(started_[warp]); }

uint32_t Warpgroup::wgmmas_before(int warp, int pending) const {
    const auto& ends = ends_of_groups_[warp];
    return std::ssize(ends) <= pending ? 0 : ends[ends.size() - 1 - pending];
}

bool Warpgroup::have_started(uint32_t products) const {
    return *std::min_element(started_.begin(), started_.end()) >= products;
}

void Warpgroup::finish(int thread, uint32_t products, HappensBefore& order,
                       const SharedMemory& shared) {
    while (performed_ < products) perform_first(shared);
    registers(thread).finish(products);
    order.acquire(thread, agent_, products);
}

void Warpgroup::perform_first(const SharedMemory& shared) {
    Started& started = products_.front();
    std::array<WgmmaThread, kThreads> threads;
    for (int thread = 0; thread < kThreads; ++thread)
        threads[thread] = {registers_[thread].values(started.accumulators[thread]).data(),
                           started.fragments[thread].data()};
    perform(started.product, started.a, started.b, threads, shared);
    products_.pop_front();
    ++performed_;
}

std::string Warpgroup::state() const {
    std::string text = "wgmmas that not all warps of the warpgroup have issued: they have issued";
    for (const uint32_t count : started_) text += " " + std::to_string(count);
    return text;
}

}  // namespace jvp_attn::emulator
