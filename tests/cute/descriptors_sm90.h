// Matrix descriptors of csrc/sm90/tile.cuh: CuTe makes them when it partitions a tile for a wgmma.
#pragma once

#include "cute_tile.h"

namespace jvp_attn::witness {

constexpr auto kK = cute::SM90::GMMA::Major::K;
constexpr auto kMn = cute::SM90::GMMA::Major::MN;

// The wgmma of N columns.
template <int N, auto kMajorA, auto kMajorB>
using WgmmaOp =
    decltype(cute::SM90::GMMA::ss_op_selector<CuteElement, CuteElement, float,
                                              cute::Shape<cute::_64, cute::Int<N>, cute::_16>,
                                              kMajorA, kMajorB>());

// The descriptors of the blocks of Extent x 16 elements that wgmmas multiply.
template <class FragmentType, int Extent, class Tensor>
auto descriptors(const Tensor& x) {
    const auto blocks = cute::zipped_divide(x, cute::Shape<cute::Int<Extent>, cute::_16>{});
    const auto fragment = cute::make_tensor<FragmentType>(blocks);
    return [fragment](int block, int step) -> uint64_t {
        return fragment(0, cute::make_coord(block, step)).desc_;
    };
}

template <auto kMajor, class Tensor>
auto left_descriptors(const Tensor& x) {
    return descriptors<typename cute::MMA_Traits<WgmmaOp<64, kMajor, kMn>>::FrgTypeA, 64>(x);
}

template <int N, auto kMajor, class Tensor>
auto right_descriptors(const Tensor& x) {
    return descriptors<typename cute::MMA_Traits<WgmmaOp<N, kK, kMajor>>::FrgTypeB, N>(x);
}

// Of one atom only, wgmma reads no LBO, and CuTe leaves there what its layout has.
enum class Lbo { read, unread };

inline void compare_descriptor(Comparison& comparison, uint64_t csrc, uint64_t cute, int i,
                               int step, Lbo lbo = Lbo::read) {
    uint64_t other_bits = ~uint64_t{0};
    const auto field = [&](const char* what, int shift, int bits) {
        const uint64_t mask = ((uint64_t{1} << bits) - 1) << shift;
        other_bits &= ~mask;
        comparison.equal((csrc & mask) >> shift, (cute & mask) >> shift, what, i, step);
    };
    field("start / 16 of (row or panel, step)", 0, 14);
    if (lbo == Lbo::read)
        field("LBO / 16 of (row or panel, step)", 16, 14);
    else
        other_bits &= ~(uint64_t{0x3fff} << 16);
    field("SBO / 16 of (row or panel, step)", 32, 14);
    field("base offset of (row or panel, step)", 49, 3);
    field("swizzle mode of (row or panel, step)", 62, 2);
    comparison.equal(csrc & other_bits, cute & other_bits, "other bits of (row or panel, step)", i,
                     step);
}

// Tile::columns: the contracted columns of a tile, for 64 rows on the left and all rows on the
// right. Steps beyond the tile's columns, in its last atom, are not multiplied.
template <int Rows, int Columns>
void compare_columns(Comparison& comparison) {
    const auto tile = example_tile<Rows, Columns>();
    const auto rows = k_major<Rows, Columns>(tile.base);
    const auto right = right_descriptors<Rows, kK>(rows);
    for (int k = 0; k < Columns / 16; ++k)
        compare_descriptor(comparison, tile.columns(0, k), right(0, k), 0, k);
    if constexpr (Rows % 64 == 0) {
        const auto left = left_descriptors<kK>(rows);
        for (int row = 0; row < Rows; row += 64)
            for (int k = 0; k < Columns / 16; ++k)
                compare_descriptor(comparison, tile.columns(row, k), left(row / 64, k), row, k);
    }
}

// Tile::rows: the contracted rows of a tile. A tile of 96 columns has the descriptor of 128.
template <int Rows, int Columns>
void compare_rows(Comparison& comparison) {
    const auto tile = example_tile<Rows, Columns>();
    const auto columns = mn_major<Rows, Columns>(tile.base);
    const auto right = right_descriptors<whole_atoms(Columns), kMn>(columns);
    const auto left = left_descriptors<kMn>(columns);
    for (int k = 0; k < Rows / 16; ++k) {
        compare_descriptor(comparison, tile.rows(k), right(0, k), 0, k,
                           Columns > 64 ? Lbo::read : Lbo::unread);
        // wgmma takes 64 rows of the result from the left, so one panel.
        for (int panel = 0; panel < tile.kPanels; ++panel)
            compare_descriptor(comparison, tile.panel(panel).rows(k), left(panel, k), panel, k,
                               Lbo::unread);
    }
}

// The right factor of multiply_left_transposed: a tile of 64 columns, and a part of another one
// `TilesApart` tiles behind. CuTe builds whole atoms, so here it takes all 64 columns of the other.
template <int Rows, int TilesApart>
void compare_two_tiles(Comparison& comparison) {
    using namespace cute;
    const auto tile = example_tile<Rows, 64>();
    constexpr int kDistance = TilesApart * tile.kBytes;
    const auto layout = composition(
        Swizzle<3, 4, 3>{}, smem_ptr_flag_bits<16>{},
        Layout<Shape<Shape<_64, _2>, Int<Rows>>, Stride<Stride<_1, Int<kDistance / 2>>, _64>>{});
    const auto columns = make_tensor(make_smem_ptr(shared_pointer(tile.base)), layout);
    const auto right = right_descriptors<128, kMn>(columns);
    for (int k = 0; k < Rows / 16; ++k)
        compare_descriptor(comparison, tile.rows(k, kDistance), right(0, k), 0, k);
}

}  // namespace jvp_attn::witness
