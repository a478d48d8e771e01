// The tiles of csrc/sm90/tile.cuh as CuTe builds them, from its atoms of the 128-byte swizzle.
#pragma once

#include "comparison.h"
#include "recorder.h"
#include "sm90/tile.cuh"

namespace jvp_attn::witness {

using CuteElement = cute::bfloat16_t;

// CuTe builds whole atoms only: a tile of 96 columns occupies 128 in memory in both.
constexpr int whole_atoms(int columns) { return (columns + 63) / 64 * 64; }

inline CuteElement* shared_pointer(SharedAddress address) {
    return reinterpret_cast<CuteElement*>(witness_shared_memory + address);
}

// The address of an element of a CuTe tensor.
template <class Reference>
SharedAddress address_of(Reference& element) {
    return static_cast<SharedAddress>(__cvta_generic_to_shared(&element));
}

// (row, column) with contiguous columns. As a factor whose columns are contracted it is K-major.
template <int Rows, int Columns>
auto k_major_layout() {
    return cute::tile_to_shape(cute::GMMA::Layout_K_SW128_Atom<CuteElement>{},
                               cute::Shape<cute::Int<Rows>, cute::Int<whole_atoms(Columns)>>{});
}

template <int Rows, int Columns>
auto k_major(SharedAddress base) {
    return cute::make_tensor(cute::make_smem_ptr(shared_pointer(base)),
                             k_major_layout<Rows, Columns>());
}

// The same memory as (column, row). As a factor whose rows are contracted it is MN-major.
template <int Rows, int Columns>
auto mn_major(SharedAddress base) {
    const auto layout =
        cute::tile_to_shape(cute::GMMA::Layout_MN_SW128_Atom<CuteElement>{},
                            cute::Shape<cute::Int<whole_atoms(Columns)>, cute::Int<Rows>>{},
                            cute::Step<cute::_2, cute::_1>{});
    return cute::make_tensor(cute::make_smem_ptr(shared_pointer(base)), layout);
}

// A tile far from the start of shared memory, so that start addresses have many bits.
template <int Rows, int Columns>
sm90::Tile<Rows, Columns> example_tile() {
    return {0xb400};
}

// Tile::chunk and Tile::panel: where each element is.
template <int Rows, int Columns>
void compare_addresses(Comparison& comparison) {
    const auto tile = example_tile<Rows, Columns>();
    const auto rows = k_major<Rows, Columns>(tile.base);
    const auto columns = mn_major<Rows, Columns>(tile.base);
    for (int row = 0; row < Rows; ++row)
        for (int column = 0; column < whole_atoms(Columns); ++column) {
            const int in_chunk = column % 8 * 2;
            comparison.equal(tile.chunk(row, column / 8) + in_chunk, address_of(rows(row, column)),
                             "address of (row, column)", row, column);
            comparison.equal(tile.panel(column / 64).chunk(row, column % 64 / 8) + in_chunk,
                             address_of(columns(column, row)),
                             "address in its panel of (row, column)", row, column);
        }
    comparison.equal(int{tile.kBytes}, static_cast<int>(cute::cosize(rows.layout())) * 2,
                     "bytes of the tile");
}

}  // namespace jvp_attn::witness
