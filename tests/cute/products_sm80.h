// The tiles, fragments and products of csrc/sm80/tile.cuh: ldmatrix and mma by CuTe's layouts.
#pragma once

#include "products.h"
#include "sm80/tile.cuh"

namespace jvp_attn::witness {

using MmaTraits = cute::MMA_Traits<cute::SM80_16x8x16_F32BF16BF16F32_TN>;

// float16 has the layouts of bfloat16.
using Fp16MmaTraits = cute::MMA_Traits<cute::SM80_16x8x16_F32F16F16F32_TN>;
static_assert(std::is_same_v<Fp16MmaTraits::ALayout, MmaTraits::ALayout>);
static_assert(std::is_same_v<Fp16MmaTraits::BLayout, MmaTraits::BLayout>);
static_assert(std::is_same_v<Fp16MmaTraits::CLayout, MmaTraits::CLayout>);

// The 16-bit elements of a fragment's registers.
inline int element(const uint32_t* words, int value) {
    return words[value / 2] >> value % 2 * 16 & 0xffff;
}

// Tile::chunk: within groups of 64 or 32 columns the rows are swizzled as in the atoms of
// FlashAttention-2, Swizzle<3, 3, 3> of 8 x 64 or Swizzle<2, 3, 3> of 8 x 32. In csrc the groups of
// a row are next to each other.
template <int Rows, int Columns>
void compare_swizzle(Comparison& comparison) {
    using namespace cute;
    constexpr int kGroup = Columns % 64 == 0 ? 64 : 32;
    const jvp_attn::Tile<Rows, Columns> tile{0x800};
    const auto atom = composition(Swizzle<kGroup == 64 ? 3 : 2, 3, 3>{},
                                  Layout<Shape<_8, Int<kGroup>>, Stride<Int<kGroup>, _1>>{});
    const auto swizzled = tile_to_shape(atom, Shape<Int<Rows>, Int<kGroup>>{});
    const Layout<Shape<Int<kGroup>, Int<Rows>>, Stride<_1, Int<Columns>>> memory;
    for (int row = 0; row < Rows; ++row)
        for (int column = 0; column < Columns; ++column) {
            const int in_group = memory(swizzled(row, column % kGroup));
            comparison.equal<int>(tile.chunk(row, column / 8) - tile.base + column % 8 * 2,
                                  2 * (column / kGroup * kGroup + in_group),
                                  "offset of (row, column)", row, column);
        }
}

template <int Rows, int Columns>
void fill(const jvp_attn::Tile<Rows, Columns>& tile, const auto& bits_at) {
    for (int row = 0; row < Rows; ++row)
        for (int column = 0; column < Columns; ++column) {
            const uint16_t bits = bits_at(row, column);
            std::memcpy(witness_shared_memory + tile.chunk(row, column / 8) + column % 8 * 2, &bits,
                        2);
        }
}

template <int Rows, int Columns>
void fill(const jvp_attn::Tile<Rows, Columns>& tile, const Matrix& x) {
    fill(tile, [&](int row, int column) { return emulator::bf16_from(x(row, column)); });
}

// Tile::left, right_transposed and right: each element of the fragments.
template <int Rows, int Columns>
void compare_fragments(Comparison& comparison) {
    const jvp_attn::Tile<Rows, Columns> tile{0x800};
    fill(tile, [](int row, int column) { return row * Columns + column; });
    const MmaTraits::ALayout left_place;
    const MmaTraits::BLayout right_place;
    const auto compare = [&](int element, int row, int column, const char* what) {
        comparison.equal(element, row * Columns + column, what, row, column);
    };
    for (int row = 0; row < Rows; row += 16)
        for (int step = 0; step < Columns / 16; ++step)
            as_warp([&](int lane) {
                const Words4 left = tile.left(row, step);
                const Words4 right_transposed = tile.right_transposed(row, step);
                const Words4 right = tile.right(row, step);
                if (pass == Pass::rows) return;
                for (int value = 0; value < 8; ++value) {
                    const int place = left_place(lane, value);
                    compare(element(left.word, value), row + place % 16, 16 * step + place / 16,
                            "left fragment (row, column)");
                }
                for (int n = 0; n < 2; ++n)  // 8 columns of the result
                    for (int value = 0; value < 4; ++value) {
                        const int place = right_place(lane, value);
                        const int column = 8 * n + place % 8, k = place / 8;
                        compare(element(right_transposed.word + 2 * n, value), row + column,
                                16 * step + k, "transposed right fragment (row, column)");
                        compare(element(right.word + 2 * n, value), row + k, 16 * step + column,
                                "right fragment (row, column)");
                    }
            });
}

// Performs the recorded mmas of a warp.
inline void perform_mmas() {
    const MmaTraits::ALayout a_place;
    const MmaTraits::BLayout b_place;
    const MmaTraits::CLayout c_place;
    for (std::size_t i = 0; i < recorded[0].mmas.size(); ++i) {
        Matrix a(16, 16), b(16, 8), c(16, 8);
        for (int lane = 0; lane < 32; ++lane) {
            const Mma& x = recorded[lane].mmas[i];
            for (int value = 0; value < 8; ++value) {
                const int place = a_place(lane, value);
                a(place % 16, place / 16) = emulator::float_from_bf16(element(x.a.word, value));
            }
            for (int value = 0; value < 4; ++value) {
                const int place = b_place(lane, value);
                b(place / 8, place % 8) = emulator::float_from_bf16(element(x.b, value));
                const int result = c_place(lane, value);
                c(result % 16, result / 16) = x.accumulator[value];
            }
        }
        add_product(c, a, b);
        for (int lane = 0; lane < 32; ++lane)
            for (int value = 0; value < 4; ++value) {
                const int place = c_place(lane, value);
                recorded[lane].mmas[i].accumulator[value] = c(place % 16, place / 16);
            }
    }
}

// c + A Bᵀ for each 16 rows of A; alone, and for two A at once.
template <int Rows, int Keys, int Columns>
void compare_mma_multiply_transposed(Comparison& comparison) {
    const jvp_attn::Tile<Rows, Columns> a{0}, other_a{a.kBytes};
    const jvp_attn::Tile<Keys, Columns> b{2 * a.kBytes};
    const Matrix left = random_matrix(Rows, Columns), other_left = random_matrix(Rows, Columns);
    const Matrix right = random_matrix(Keys, Columns);
    fill(a, left);
    fill(other_a, other_left);
    fill(b, right);
    for (int row = 0; row < Rows; row += 16) {
        Matrix expected = random_matrix(16, Keys), other_expected = random_matrix(16, Keys);
        auto alone = accumulators_of<Keys>(expected), first = alone;
        auto second = accumulators_of<Keys>(other_expected);
        as_warp([&](int lane) {
            multiply_transposed<Bf16>(alone[lane], a, row, b);
            multiply_transposed<Bf16>(first[lane], a, second[lane], other_a, row, b);
        });
        perform_mmas();
        add_product(expected, left.rows_from(row, 16), right.transposed());
        add_product(other_expected, other_left.rows_from(row, 16), right.transposed());
        compare_product<Keys>(comparison, alone, expected, "A Bᵀ in (lane, register)");
        compare_product<Keys>(comparison, first, expected, "first A Bᵀ of two in (lane, register)");
        compare_product<Keys>(comparison, second, other_expected,
                              "second A Bᵀ of two in (lane, register)");
    }
}

// c + A B, where A is in registers; alone, and for two A at once.
template <int Keys, int Columns>
void compare_mma_multiply(Comparison& comparison) {
    const jvp_attn::Tile<Keys, Columns> b{0};
    const Matrix left = random_matrix(16, Keys), other_left = random_matrix(16, Keys);
    const Matrix right = random_matrix(Keys, Columns);
    fill(b, right);
    Matrix expected = random_matrix(16, Columns), other_expected = random_matrix(16, Columns);
    auto alone = accumulators_of<Columns>(expected), first = alone;
    auto second = accumulators_of<Columns>(other_expected);
    as_warp([&](int lane) {
        const auto a = packed_rows<Keys>(left), other_a = packed_rows<Keys>(other_left);
        multiply<Bf16>(alone[lane], a, b);
        multiply<Bf16>(first[lane], a, second[lane], other_a, b);
    });
    perform_mmas();
    add_product(expected, left, right);
    add_product(other_expected, other_left, right);
    compare_product<Columns>(comparison, alone, expected, "A B in (lane, register)");
    compare_product<Columns>(comparison, first, expected, "first A B of two in (lane, register)");
    compare_product<Columns>(comparison, second, other_expected,
                             "second A B of two in (lane, register)");
}

}  // namespace jvp_attn::witness
