// What the registers of an accumulator hold while a product in the background works on them: one
// NaN that nothing else makes.
#pragma once

#include <bit>
#include <cstdint>

#include "report.h"

namespace jvp_attn::emulator {

// A signalling NaN. Arithmetic makes a quiet one of it, perhaps of the other sign, and keeps the
// rest.
constexpr uint32_t kInFlight = 0x7f91f1f1;
constexpr uint32_t kKept = 0x7fbfffff;

[[noreturn]] void complain_of_use_in_flight(const char* instruction, const Place& where);

inline void check_not_in_flight(float value, const char* instruction, const Place& where) {
    if ((std::bit_cast<uint32_t>(value) & kKept) == kInFlight)
        complain_of_use_in_flight(instruction, where);
}

}  // namespace jvp_attn::emulator
