// bfloat16 and float16 as bits, rounded and widened exactly as a GPU does.
#pragma once

#include <bit>
#include <cstdint>

namespace jvp_attn::emulator {

// A GPU's NaN in both types; it keeps no payload.
constexpr uint16_t kNan16 = 0x7fff;

inline uint16_t bf16_from(float value) {
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    if (value != value) return kNan16;
    const uint32_t odd = bits >> 16 & 1;  // ties go to the even neighbour
    return static_cast<uint16_t>((bits + 0x7fff + odd) >> 16);
}

inline float float_from_bf16(uint16_t bits) {
    return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

inline uint16_t fp16_from(float value) {
    if (value != value) return kNan16;
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    const uint16_t sign = bits >> 16 & 0x8000;
    const uint32_t size = bits & 0x7fffffff;
    if (size >= 0x477ff000) return sign | 0x7c00;  // 65520 and above: infinity
    if (size < 0x38800000) {                       // below 2^-14: a multiple of 2^-24
        // The sum has an ulp of 2^-24, so adding rounds to it, ties to even.
        const float sum = std::bit_cast<float>(size) + 0.5f;
        return sign | static_cast<uint16_t>(std::bit_cast<uint32_t>(sum) - 0x3f000000);
    }
    const uint32_t odd = size >> 13 & 1;
    const uint32_t rounded = size + 0xfff + odd;
    constexpr uint32_t kOtherBias = (127 - 15) << 10;
    return sign | static_cast<uint16_t>((rounded >> 13) - kOtherBias);
}

// Without branches, so that loops over it vectorize.
inline float float_from_fp16(uint16_t bits) {
    const uint32_t size = static_cast<uint32_t>(bits & 0x7fff) << 13;
    // As a float32 the exponent is 112 too small; for infinity and NaN it is to be all ones.
    const float finite = std::bit_cast<float>(size) * 0x1p112f;
    const uint32_t special = (bits & 0x7c00) == 0x7c00 ? 0x7f800000 : 0;
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
    return std::bit_cast<float>(std::bit_cast<uint32_t>(finite) | special | sign);
}

}  // namespace jvp_attn::emulator
