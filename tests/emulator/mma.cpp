#include "mma.h"

#include <cstring>

#include "half_types.h"

namespace jvp_attn::emulator {

namespace {

template <class Argument>
Argument& of_lane(std::span<void* const> arguments, int lane) {
    return *static_cast<Argument*>(arguments[lane]);
}

template <bool Transposed>
void load(std::span<void* const> arguments) {
    for (int matrix = 0; matrix < 4; ++matrix) {
        uint16_t element[8][8];
        for (int row = 0; row < 8; ++row)
            std::memcpy(element[row], of_lane<LoadMatrices>(arguments, 8 * matrix + row).row,
                        sizeof element[row]);
        for (int lane = 0; lane < 32; ++lane) {
            const int g = lane / 4, t = lane % 4;
            const uint32_t low = Transposed ? element[2 * t][g] : element[g][2 * t];
            const uint32_t high = Transposed ? element[2 * t + 1][g] : element[g][2 * t + 1];
            of_lane<LoadMatrices>(arguments, lane).result.word[matrix] = low | high << 16;
        }
    }
}

// Four float32 in a vector register.
using Four = float __attribute__((vector_size(16)));

// C (16 x 8) += A (16 x 16) B (16 x 8). The products of two elements are exact in float32.
template <float (*Widen)(uint16_t)>
void multiply_add(std::span<void* const> arguments) {
    uint32_t a_words[16][8], b_words[8][8];  // b_words: of B transposed
    Four c[16][2];
    for (int lane = 0; lane < 32; ++lane) {
        const auto& x = of_lane<MultiplyAdd>(arguments, lane);
        const int g = lane / 4, t = lane % 4;
        a_words[g][t] = x.a->word[0];
        a_words[g + 8][t] = x.a->word[1];
        a_words[g][t + 4] = x.a->word[2];
        a_words[g + 8][t + 4] = x.a->word[3];
        b_words[g][t] = x.b0;
        b_words[g][t + 4] = x.b1;
        std::memcpy(reinterpret_cast<float*>(c[g]) + 2 * t, x.accumulator, 8);
        std::memcpy(reinterpret_cast<float*>(c[g + 8]) + 2 * t, x.accumulator + 2, 8);
    }

    uint16_t elements[16];
    Four b[16][2];
    for (int column = 0; column < 8; ++column) {
        std::memcpy(elements, b_words[column], sizeof elements);
        for (int k = 0; k < 16; ++k) b[k][column / 4][column % 4] = Widen(elements[k]);
    }
    for (int row = 0; row < 16; ++row) {
        std::memcpy(elements, a_words[row], sizeof elements);
        for (int k = 0; k < 16; ++k) {
            const float a = Widen(elements[k]);
            for (int half = 0; half < 2; ++half) c[row][half] += a * b[k][half];
        }
    }

    for (int lane = 0; lane < 32; ++lane) {
        const auto& x = of_lane<MultiplyAdd>(arguments, lane);
        const int g = lane / 4, t = lane % 4;
        std::memcpy(x.accumulator, reinterpret_cast<float*>(c[g]) + 2 * t, 8);
        std::memcpy(x.accumulator + 2, reinterpret_cast<float*>(c[g + 8]) + 2 * t, 8);
    }
}

}  // namespace

void load_matrices_of_warp(std::span<void* const> arguments) { load<false>(arguments); }

void load_matrices_transposed_of_warp(std::span<void* const> arguments) { load<true>(arguments); }

void multiply_add_bf16_of_warp(std::span<void* const> arguments) {
    multiply_add<float_from_bf16>(arguments);
}

void multiply_add_fp16_of_warp(std::span<void* const> arguments) {
    multiply_add<float_from_fp16>(arguments);
}

}  // namespace jvp_attn::emulator
