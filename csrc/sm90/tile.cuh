// Tiles of elements in shared memory: filled by the TMA, multiplied by a warpgroup.
//
// A tile consists of panels of 64 columns. A row of a panel is 128 bytes, eight chunks of 16, which
// change places such that one chunk of 8 successive rows comes from 8 different groups of banks:
// chunk c of row i is at c ^ (i % 8). Copy engine and wgmma know this layout as the 128-byte
// swizzle.
#pragma once

#include "common/fragment.cuh"
#include "sm90/ptx.cuh"

namespace jvp_attn::sm90 {

constexpr int kMaxSharedBytes = 227 * 1024;  // of a block

constexpr int kPanelColumns = 64;
constexpr int kPanelRowBytes = 128;
constexpr int kSwizzleBytes = 1024;  // the layout repeats after 8 rows; panels start at multiples

// How wgmma finds a factor: `leading` and `stride` are distances in bytes, 1 << 62 stands for the
// 128-byte swizzle. (PTX: matrix descriptor)
DEVICE uint64_t matrix_descriptor(SharedAddress start, int leading, int stride) {
    return static_cast<uint64_t>((start & 0x3ffff) >> 4) |
           static_cast<uint64_t>(leading >> 4) << 16 | static_cast<uint64_t>(stride >> 4) << 32 |
           uint64_t{1} << 62;
}

template <int Rows, int Columns>
struct Tile {
    static constexpr int kRows = Rows;
    static constexpr int kPanels = (Columns + kPanelColumns - 1) / kPanelColumns;
    static constexpr int kPanelBytes = Rows * kPanelRowBytes;
    static constexpr int kBytes = kPanels * kPanelBytes;
    static_assert(kPanelBytes % kSwizzleBytes == 0);

    SharedAddress base;

    // 64 of the columns.
    DEVICE Tile<Rows, kPanelColumns> panel(int i) const { return {base + i * kPanelBytes}; }

    DEVICE SharedAddress chunk(int row, int chunk) const {
        return base + chunk / 8 * kPanelBytes + row * kPanelRowBytes + (chunk % 8 ^ row % 8) * 16;
    }

    // The columns 16 step to 16 step + 15 of the rows from `row`, a multiple of 8, on: a factor
    // whose columns the product sums over.
    DEVICE uint64_t columns(int row, int step) const {
        const int offset = step / 4 * kPanelBytes + step % 4 * 32;
        return matrix_descriptor(base + row * kPanelRowBytes, 16, kSwizzleBytes) + (offset >> 4);
    }

    // The rows 16 step to 16 step + 15: a factor whose rows the product sums over. From one panel
    // to the next it is so many bytes.
    DEVICE uint64_t rows(int step, int to_next_panel = kPanelBytes) const {
        return matrix_descriptor(base, to_next_panel, kSwizzleBytes) +
               (step * 16 * kPanelRowBytes >> 4);
    }
};

// ---------------------------------------------------------------------------------------------
// Products. A warpgroup multiplies 64 rows; they are under way until `wgmma_wait`.

// c = A Bᵀ, plus c if `accumulate`, where A is 64 rows of a tile.
template <class Element, int N, int M, int D>
DEVICE void multiply_transposed(Accumulator<N>& c, const Tile<M, D>& a, int row,
                                const Tile<N, D>& b, bool accumulate) {
#pragma unroll
    for (int step = 0; step < D / 16; ++step)
        wgmma<Element, Major::contraction, Major::contraction>(
            c.value, a.columns(row, step), b.columns(0, step), accumulate || step > 0);
}

// c += A B.
template <class Element, int K, int D>
DEVICE void multiply(Accumulator<D>& c, const Packed<Element, K>& a, const Tile<K, D>& b) {
#pragma unroll
    for (int step = 0; step < K / 16; ++step)
        wgmma<Element, Major::result>(c.value, a.word[step], b.rows(step), true);
}

// c = Aᵀ B, where A has 64 columns, and B those of two tiles: 64 of the first, and 8 of the second,
// which lies behind it in memory.
template <class Element, int K>
DEVICE void multiply_left_transposed(Accumulator<72>& c, const Tile<K, 64>& a, const Tile<K, 64>& b,
                                     const Tile<K, 64>& b_beyond) {
#pragma unroll
    for (int step = 0; step < K / 16; ++step)
        wgmma<Element, Major::result, Major::result>(
            c.value, a.rows(step), b.rows(step, b_beyond.base - b.base), step > 0);
}

}  // namespace jvp_attn::sm90
