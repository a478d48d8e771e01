// Conversions between float32 and the half precision types, each 16 bits in a uint16_t.
#pragma once

#include <bit>
#include <cstdint>

namespace jvp_attn::cpu::JVP_ATTN_ISA {

inline float float_from_bfloat16(uint16_t x) { return std::bit_cast<float>(uint32_t{x} << 16); }

inline float float_from_float16(uint16_t x) {
    // The product corrects the exponent's bias, 15 instead of 127, and normalizes subnormals.
    const float magnitude = std::bit_cast<float>(uint32_t(x & 0x7fff) << 13) * 0x1p112f;
    const uint32_t infinite = (x & 0x7fff) >= 0x7c00 ? 0x7f800000 : 0;
    return std::bit_cast<float>(std::bit_cast<uint32_t>(magnitude) | infinite |
                                uint32_t(x & 0x8000) << 16);
}

inline uint16_t bfloat16_from_float(float x) {
    const auto bits = std::bit_cast<uint32_t>(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return bits >> 16 | 0x40;  // NaN
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline uint16_t float16_from_float(float x) {
    const auto bits = std::bit_cast<uint32_t>(x);
    const uint16_t sign = bits >> 16 & 0x8000;
    const uint32_t magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return sign | 0x7e00;   // NaN
    if (magnitude >= 0x477ff000) return sign | 0x7c00;  // rounds to infinity
    if (magnitude < 0x38800000) {                       // subnormal: adding 1/2 rounds
        const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
        return sign | (std::bit_cast<uint32_t>(shifted) - 0x3f000000);
    }
    return sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

}  // namespace jvp_attn::cpu::JVP_ATTN_ISA
