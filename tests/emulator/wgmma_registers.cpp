#include "wgmma_registers.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <string>

#include "current.h"
#include "in_flight.h"

namespace jvp_attn::emulator {

namespace {

bool is_untouched(const float* registers, std::size_t count) {
    return std::all_of(registers, registers + count, [](const float& value) {
        return std::bit_cast<uint32_t>(value) == kInFlight;
    });
}

template <class Registers>
auto find(Registers& registers, const void* address) {
    return std::find_if(registers.begin(), registers.end(),
                        [&](const auto& x) { return x.address == address; });
}

}  // namespace

void report_use_in_flight(const char* instruction, const Place& where) {
    fail(self(instruction, where),
         "its operand comes from an accumulator of a wgmma that is still in flight");
}

template <class Value>
void WgmmaRegisters::Registers<Value>::store_at_fence() {
    at_fence.assign(address, address + values.size());
}

template <class Value>
bool WgmmaRegisters::Registers<Value>::is_as_at_fence() const {
    return at_fence.empty() ||
           std::memcmp(address, at_fence.data(), at_fence.size() * sizeof(Value)) == 0;
}

template <class Value>
void WgmmaRegisters::Registers<Value>::check_is_unchanged() const {
    if (in_flight && !std::equal(values.begin(), values.end(), address))
        fail(actor, "its operand in registers was changed before the wgmma_wait");
}

void WgmmaRegisters::start_thread() {
    accumulators_.clear();
    operands_.clear();
    fenced_ = false;
}

void WgmmaRegisters::fence() {
    for (auto& accumulator : accumulators_)
        if (!accumulator.in_flight) accumulator.store_at_fence();
    for (auto& operand : operands_) operand.store_at_fence();
    fenced_ = true;
}

void WgmmaRegisters::check_fenced(const Actor& actor) const {
    if (!fenced_)
        fail(actor, "there is no wgmma_fence since the last wgmma_wait, or since the start");
}

void WgmmaRegisters::start(const Actor& actor, std::span<float> accumulator, uint32_t number) {
    check_fenced(actor);
    auto known = find(accumulators_, accumulator.data());
    if (known != accumulators_.end() && known->in_flight) {
        if (known->values.size() != accumulator.size())
            fail(actor, "the accumulator has " + std::to_string(accumulator.size()) +
                            " registers, but " + text(known->actor) + " works on " +
                            std::to_string(known->values.size()) + " of them");
        if (!is_untouched(accumulator.data(), accumulator.size()))
            fail(actor, "the accumulator was changed while " + text(known->actor) + " works on it");
    } else {
        if (known != accumulators_.end() && known->values.size() != accumulator.size()) {
            accumulators_.erase(known);
            known = accumulators_.end();
        }
        if (known == accumulators_.end())
            known = accumulators_.insert(known, {accumulator.data(), {}, {}, false, 0, actor});
        if (!known->is_as_at_fence())
            fail(actor, "the accumulator was changed after the last wgmma_fence");
        known->values.assign(accumulator.begin(), accumulator.end());
        known->in_flight = true;
        std::fill(accumulator.begin(), accumulator.end(), std::bit_cast<float>(kInFlight));
    }
    known->last_product = number;
    known->actor = actor;
}

void WgmmaRegisters::start(const Actor& actor, Fragment operand, uint32_t number) {
    auto known = find(operands_, operand.data());
    if (known == operands_.end())
        known = operands_.insert(known, {operand.data(), {}, {}, false, 0, actor});
    if (!known->is_as_at_fence())
        fail(actor, "an operand in registers was changed after the last wgmma_fence");
    known->check_is_unchanged();
    known->values.assign(operand.begin(), operand.end());
    known->in_flight = true;
    known->last_product = number;
    known->actor = actor;
}

std::span<float> WgmmaRegisters::values(const float* accumulator) {
    return find(accumulators_, accumulator)->values;
}

void WgmmaRegisters::finish(uint32_t number) {
    for (auto& accumulator : accumulators_) {
        if (!accumulator.in_flight || accumulator.last_product >= number) continue;
        auto* registers = const_cast<float*>(accumulator.address);
        if (!is_untouched(registers, accumulator.values.size()))
            fail(accumulator.actor, "its accumulator was changed before the wgmma_wait");
        std::copy(accumulator.values.begin(), accumulator.values.end(), registers);
        accumulator.in_flight = false;
    }
    for (auto& operand : operands_) {
        if (!operand.in_flight || operand.last_product >= number) continue;
        operand.check_is_unchanged();
        operand.in_flight = false;
    }
    fenced_ = false;
}

void WgmmaRegisters::check_idle(const Actor& actor, const void* registers) const {
    const auto accumulator = find(accumulators_, registers);
    if (accumulator != accumulators_.end() && accumulator->in_flight)
        fail(actor, "fences registers that " + text(accumulator->actor) + " works on");
    const auto operand = find(operands_, registers);
    if (operand != operands_.end() && operand->in_flight)
        fail(actor, "fences registers that " + text(operand->actor) + " reads");
}

void WgmmaRegisters::check_finished() const {
    for (const auto& accumulator : accumulators_)
        if (accumulator.in_flight) fail(accumulator.actor, "the thread ends before the wgmma_wait");
}

}  // namespace jvp_attn::emulator
