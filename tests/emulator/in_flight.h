// The value of accumulator registers while a wgmma is in flight: a NaN that no arithmetic produces.
#pragma once

#include <bit>
#include <cstdint>

#include "report.h"

namespace jvp_attn::emulator {

// A signalling NaN. Arithmetic makes it quiet, may change its sign, and keeps the other bits.
constexpr uint32_t kInFlight = 0x7f91f1f1;
constexpr uint32_t kKept = 0x7fbfffff;

[[noreturn]] void report_use_in_flight(const char* instruction, const Place& where);

inline void check_not_in_flight(float value, const char* instruction, const Place& where) {
    if ((std::bit_cast<uint32_t>(value) & kKept) == kInFlight)
        report_use_in_flight(instruction, where);
}

}  // namespace jvp_attn::emulator
