// Which elements a thread of a warpgroup holds: accumulators, left factors in registers, and the
// rows of stmatrix and ldmatrix.
#pragma once

#include "descriptors_sm90.h"
#include "sm90/epilogue.cuh"

namespace jvp_attn::witness {

// The row and column of a matrix of 64 rows that a thread's register holds, by one of CuTe's
// layouts.
template <class Layout>
struct Place {
    int row, column;

    Place(int thread, int value)
        : row(Layout{}(thread, value) % 64), column(Layout{}(thread, value) / 64) {}
};

template <int Columns>
using AccumulatorPlace = Place<typename cute::MMA_Traits<WgmmaOp<Columns, kK, kK>>::CLayout>;

using LeftTraits = cute::MMA_Traits<cute::SM90::GMMA::MMA_64x64x16_F32BF16BF16_RS<kK, kMn>>;
using LeftPlace = Place<LeftTraits::ALayout>;

// float16 has the layouts of bfloat16.
using Fp16LeftTraits = cute::MMA_Traits<cute::SM90::GMMA::MMA_64x64x16_F32F16F16_RS<kK, kMn>>;
static_assert(std::is_same_v<Fp16LeftTraits::ALayout, LeftTraits::ALayout>);
static_assert(std::is_same_v<Fp16LeftTraits::CLayout, LeftTraits::CLayout>);

inline int first_row_of_warp() { return warp_index() * 16; }

// row_in_warp, column_of and Accumulator::at.
template <int Columns>
void compare_accumulator(Comparison& comparison) {
    static_assert(cute::size<1>(typename cute::MMA_Traits<WgmmaOp<Columns, kK, kK>>::CLayout{}) ==
                  Columns / 2);
    as_warpgroup([&](int thread) {
        Accumulator<Columns> x;
        for (int block = 0; block < x.kBlocks; ++block)
            for (int half = 0; half < 2; ++half)
                for (int side = 0; side < 2; ++side) {
                    const int value = &x.at(block, half, side) - x.value[0];
                    const AccumulatorPlace<Columns> place(thread, value);
                    comparison.equal(first_row_of_warp() + row_in_warp(half), place.row,
                                     "row of (thread, register)", thread, value);
                    comparison.equal(column_of(block, side), place.column,
                                     "column of (thread, register)", thread, value);
                }
    });
}

// The elements of a 64 x Columns matrix that a thread holds: row · Columns + column.
template <int Columns>
Packed<Position, Columns> packed_positions() {
    Packed<Position, Columns> packed;
    for (int block = 0; block < packed.kBlocks; ++block)
        for (int half = 0; half < 2; ++half) {
            const int row = first_row_of_warp() + row_in_warp(half);
            const int low = row * Columns + column_of(block, 0);
            const int high = row * Columns + column_of(block, 1);
            packed.set(block, half, low, high);
        }
    return packed;
}

template <int Columns>
Accumulator<Columns> accumulator_positions() {
    const auto packed = packed_positions<Columns>();
    Accumulator<Columns> x;
    for (int block = 0; block < x.kBlocks; ++block)
        for (int half = 0; half < 2; ++half) {
            x.at(block, half, 0) = packed.low(block, half);
            x.at(block, half, 1) = packed.high(block, half);
        }
    return x;
}

// Packed: a left factor in registers, 16 columns in a step.
template <int Columns>
void compare_packed(Comparison& comparison) {
    as_warpgroup([&](int thread) {
        const auto packed = packed_positions<Columns>();
        for (int step = 0; step < Columns / 16; ++step)
            for (int value = 0; value < 8; ++value) {
                const LeftPlace place(thread, value);
                const int position = packed.word[step][value / 2] >> value % 2 * 16 & 0xffff;
                comparison.equal(position, place.row * Columns + 16 * step + place.column,
                                 "position in (thread, register)", thread, 8 * step + value);
            }
    });
}

// Performs the recorded stmatrix of a warp: CuTe says which bits of which lane go to which row.
inline void perform_stores() {
    const cute::Copy_Traits<cute::SM90_U32x4_STSM_N>::SrcLayout bit_of;
    for (std::size_t i = 0; i < recorded[0].stores.size(); ++i)
        for (int lane = 0; lane < 32; ++lane)
            for (int bit = 0; bit < 128; bit += 16) {
                const int target = bit_of(lane, bit);
                const SharedAddress address =
                    recorded[target / 128].stores[i].row + target % 128 / 8;
                const auto element = static_cast<uint16_t>(
                    recorded[lane].stores[i].words.word[bit / 32] >> bit % 32);
                std::memcpy(witness_shared_memory + address, &element, sizeof element);
            }
}

// StagingRows: rows that a warp stores and loads through a tile.
template <int Rows, int Columns>
void compare_staging(Comparison& comparison) {
    const auto tile = example_tile<Rows, Columns>();
    const auto elements = k_major<Rows, Columns>(tile.base);
    const auto compare = [&](int first_row, const char* what) {
        for (int row = 0; row < 16; ++row)
            for (int column = 0; column < Columns; ++column)
                comparison.equal<int>(elements(first_row + row, column).storage,
                                      row * Columns + column, what, first_row + row, column);
    };
    for (int first_row = 0; first_row < Rows; first_row += 16) {
        const sm90::StagingRows<Rows, Columns> staging{tile, first_row};
        std::memset(witness_shared_memory, 0xff, kWitnessSharedBytes);
        as_warp([&](int) { staging.template store<Position>(packed_positions<Columns>()); });
        perform_stores();
        compare(first_row, "stored Packed (row, column)");

        // Subtracting what is there leaves zeros.
        std::array<Accumulator<Columns>, 32> rows;
        as_warp([&](int lane) {
            rows[lane] = accumulator_positions<Columns>();
            staging.template subtract_from<Position>(rows[lane], {1, 1});
        });
        for (int lane = 0; lane < 32; ++lane)
            for (int value = 0; value < Columns / 2; ++value)
                comparison.equal(rows[lane].value[value / 4][value % 4], 0.f,
                                 "remainder in (lane, register)", lane, value);

        std::memset(witness_shared_memory, 0xff, kWitnessSharedBytes);
        as_warp([&](int) {
            auto positions = accumulator_positions<Columns>();
            staging.template store<Position>(positions);
        });
        perform_stores();
        compare(first_row, "stored Accumulator (row, column)");
    }
}

}  // namespace jvp_attn::witness
