// The products of csrc/sm90/tile.cuh. csrc issues the wgmmas; CuTe's layouts say which elements
// each reads and writes. The result must be the plain product.
#pragma once

#include "fragments_sm90.h"
#include "products.h"

namespace jvp_attn::witness {

// The address of an element (mn, k) of a factor, where k is contracted: the canonical layouts that
// CuTe documents at make_gmma_desc, in bytes.
inline SharedAddress operand_address(uint64_t bits, Major major, int mn, int k) {
    using namespace cute;
    const GmmaDescriptor x{bits};
    const int start = x.bitfield.start_address_ << 4;
    const int leading = x.bitfield.leading_byte_offset_ << 4;
    const int stride = x.bitfield.stride_byte_offset_ << 4;
    const Swizzle<3, 4, 3> swizzle;
    if (major == Major::contraction)
        return swizzle(start + make_layout(Shape<Shape<_8, _32>, Shape<_8, _2>>{},
                                           make_stride(make_stride(_128{}, stride),
                                                       Stride<_2, _16>{}))(mn, k));
    return swizzle(start + make_layout(Shape<Shape<_8, _8, _4>, Shape<_8, _2>>{},
                                       make_stride(make_stride(_2{}, _16{}, leading),
                                                   make_stride(_128{}, stride)))(mn, k));
}

inline Matrix operand(const Wgmma& x, uint64_t descriptor, Major major, int extent,
                      Comparison& comparison) {
    const cute::GmmaDescriptor bits{descriptor};
    using cute::SM90::GMMA::LayoutType;
    comparison.require(bits.bitfield.layout_type_ == static_cast<int>(LayoutType::B128),
                       "the swizzle is that of 128 bytes");
    comparison.require(bits.bitfield.base_offset_ == 0, "the base offset is 0");
    Matrix result(extent, 16);
    for (int mn = 0; mn < extent; ++mn)
        for (int k = 0; k < 16; ++k)
            result(mn, k) = x.widen(element_at(operand_address(descriptor, major, mn, k)));
    return result;
}

// Performs the recorded wgmmas of a warpgroup.
template <int Columns>
void perform_wgmmas(Comparison& comparison) {
    for (std::size_t i = 0; i < recorded[0].wgmmas.size(); ++i) {
        const Wgmma& first = recorded[0].wgmmas[i];
        Matrix a(64, 16), c(64, Columns);
        for (int thread = 0; thread < kWarpgroupThreads; ++thread) {
            const Wgmma& x = recorded[thread].wgmmas[i];
            comparison.require(x.a == first.a && x.b == first.b && x.accumulate == first.accumulate,
                               "all threads issue the same wgmma");
            comparison.require(x.accumulator.size() == Columns / 2, "the accumulator is whole");
            for (int value = 0; value < Columns / 2 && x.accumulate; ++value) {
                const AccumulatorPlace<Columns> place(thread, value);
                c(place.row, place.column) = x.accumulator[value];
            }
            for (int value = 0; value < 8 && x.a_in_registers; ++value) {
                const LeftPlace place(thread, value);
                a(place.row, place.column) = x.widen(x.a_registers[value / 2] >> value % 2 * 16);
            }
        }
        if (!first.a_in_registers) a = operand(first, first.a, first.major_a, 64, comparison);
        add_product(c, a, operand(first, first.b, first.major_b, Columns, comparison).transposed());
        for (int thread = 0; thread < kWarpgroupThreads; ++thread)
            for (int value = 0; value < Columns / 2; ++value) {
                const AccumulatorPlace<Columns> place(thread, value);
                recorded[thread].wgmmas[i].accumulator[value] = c(place.row, place.column);
            }
    }
}

// CuTe's layout says where the elements are. A number in the columns that fill the last atom must
// not reach the result.
template <int Rows, int Columns>
void fill(const sm90::Tile<Rows, Columns>& tile, const Matrix& x) {
    const auto elements = k_major<Rows, Columns>(tile.base);
    for (int row = 0; row < Rows; ++row)
        for (int column = 0; column < whole_atoms(Columns); ++column)
            elements(row, column) = CuteElement(column < Columns ? x(row, column) : 1000.f);
}

// A Bᵀ for each 64 rows of A, with and without an earlier sum.
template <int Rows, int Keys, int Columns>
void compare_multiply_transposed(Comparison& comparison) {
    const sm90::Tile<Rows, Columns> a{1024};
    const sm90::Tile<Keys, Columns> b{a.base + a.kBytes};
    const Matrix left = random_matrix(Rows, Columns), right = random_matrix(Keys, Columns);
    fill(a, left);
    fill(b, right);
    for (int row = 0; row < Rows; row += 64)
        for (const bool accumulate : {false, true}) {
            const Matrix earlier = random_matrix(64, Keys);
            auto c = accumulators_of<Keys>(earlier);
            as_warpgroup([&](int thread) {
                sm90::multiply_transposed<Bf16>(c[thread], a, row, b, accumulate);
            });
            perform_wgmmas<Keys>(comparison);
            Matrix expected = accumulate ? earlier : Matrix(64, Keys);
            add_product(expected, left.rows_from(row, 64), right.transposed());
            compare_product<Keys>(comparison, c, expected, "A Bᵀ in (thread, register)");
        }
}

// c + A B, where A is in registers.
template <int Keys, int Columns>
void compare_multiply(Comparison& comparison) {
    const sm90::Tile<Keys, Columns> b{1024};
    const Matrix left = random_matrix(64, Keys), right = random_matrix(Keys, Columns);
    fill(b, right);
    Matrix expected = random_matrix(64, Columns);
    auto c = accumulators_of<Columns>(expected);
    std::vector<Packed<Bf16, Keys>> a(kWarpgroupThreads);
    as_warpgroup([&](int thread) {
        a[thread] = packed_rows<Keys>(left);
        sm90::multiply<Bf16>(c[thread], a[thread], b);
    });
    perform_wgmmas<Columns>(comparison);
    add_product(expected, left, right);
    compare_product<Columns>(comparison, c, expected, "A B in (thread, register)");
}

// 64 columns of a tile, from `first` on, and 8 of another. Beyond the tile's columns are those that
// `fill` writes.
inline Matrix beside(const Matrix& x, int first, const Matrix& other) {
    Matrix both(x.rows, 72);
    for (int row = 0; row < x.rows; ++row)
        for (int column = 0; column < 72; ++column)
            both(row, column) = column >= 64                 ? other(row, column - 64)
                                : first + column < x.columns ? x(row, first + column)
                                                             : 1000.f;
    return both;
}

// c + A B, where A is in registers, and B is a tile and 8 columns of one that is not next to it.
template <int Keys>
void compare_multiply_two_tiles(Comparison& comparison) {
    const sm90::Tile<Keys, 64> b{1024}, beyond{b.base + 3 * b.kBytes};
    const Matrix left = random_matrix(64, Keys);
    const Matrix right = random_matrix(Keys, 64), further = random_matrix(Keys, 64);
    fill(b, right);
    fill(beyond, further);
    Matrix expected = random_matrix(64, 72);
    auto c = accumulators_of<72>(expected);
    std::vector<Packed<Bf16, Keys>> a(kWarpgroupThreads);
    as_warpgroup([&](int thread) {
        a[thread] = packed_rows<Keys>(left);
        sm90::multiply<Bf16>(c[thread], a[thread], b, beyond);
    });
    perform_wgmmas<72>(comparison);
    add_product(expected, left, beside(right, 0, further));
    compare_product<72>(comparison, c, expected, "A B in (thread, register)");
}

// Aᵀ B, where B is a panel of a tile, and 8 columns of another tile that is not next to it.
template <int Keys, int Columns>
void compare_multiply_left_transposed(Comparison& comparison) {
    const sm90::Tile<Keys, Columns> b{1024};
    const sm90::Tile<Keys, 64> a{b.base + b.kBytes}, beyond{a.base + 3 * a.kBytes};
    const Matrix left = random_matrix(Keys, 64), right = random_matrix(Keys, Columns);
    const Matrix further = random_matrix(Keys, 64);
    fill(a, left);
    fill(b, right);
    fill(beyond, further);
    for (int panel = 0; 64 * panel < Columns; ++panel) {
        std::vector<Accumulator<72>> c(kWarpgroupThreads);
        as_warpgroup([&](int thread) {
            sm90::multiply_left_transposed<Bf16>(c[thread], a, b.panel(panel), beyond);
        });
        perform_wgmmas<72>(comparison);
        compare_product<72>(comparison, c,
                            product(left.transposed(), beside(right, 64 * panel, further)),
                            "AᵀB in (thread, register)");
    }
}

}  // namespace jvp_attn::witness
