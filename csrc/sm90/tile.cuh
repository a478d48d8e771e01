// Tiles of elements in shared memory: filled by the TMA, multiplied by a warpgroup.
//
// A tile consists of panels of 64 columns. A row of a panel is 128 bytes: eight chunks of 16 bytes.
// Chunk c of row i is at c ^ (i % 8), so that the same chunk of 8 successive rows uses all banks.
// TMA and wgmma call this layout the 128-byte swizzle.
#pragma once

#include "common/fragment.cuh"
#include "sm90/ptx.cuh"

// csrc/generate.py defines it as 0 if the kernel table says so.
#ifndef JVP_ATTN_PARTIAL_SWIZZLE_ATOMS
#define JVP_ATTN_PARTIAL_SWIZZLE_ATOMS 1
#endif

namespace jvp_attn::sm90 {

// Whether a product may use a part of a swizzle atom, the 64 columns of a panel, of a right factor
// whose rows are contracted. PTX allows it; CUTLASS builds no such product. Without it head dim 96
// (64 columns and 32) has no kernels, and 8 columns beside 64 take a product of their own.
constexpr bool kPartialSwizzleAtoms = JVP_ATTN_PARTIAL_SWIZZLE_ATOMS;

constexpr int kMaxSharedBytes = 227 * 1024;  // of a block

constexpr int kPanelColumns = 64;
constexpr int kPanelRowBytes = 128;
constexpr int kSwizzleBytes = 1024;  // the layout repeats after 8 rows; panels start at multiples

// How wgmma addresses a factor: `leading` and `stride` are distances in bytes, less than 2^18 and
// so any in the shared memory of a block; 1 << 62 selects the 128-byte swizzle. (PTX: matrix
// descriptor)
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

    // Columns 64 i to 64 i + 63.
    DEVICE Tile<Rows, kPanelColumns> panel(int i) const { return {base + i * kPanelBytes}; }

    DEVICE SharedAddress chunk(int row, int chunk) const {
        return base + chunk / 8 * kPanelBytes + row * kPanelRowBytes + (chunk % 8 ^ row % 8) * 16;
    }

    // Columns 16 step to 16 step + 15 of the rows from `row` on, a multiple of 8: a factor whose
    // columns are contracted (K-major).
    DEVICE uint64_t columns(int row, int step) const {
        const int offset = step / 4 * kPanelBytes + step % 4 * 32;
        return matrix_descriptor(base + row * kPanelRowBytes, 16, kSwizzleBytes) + (offset >> 4);
    }

    // Rows 16 step to 16 step + 15: a factor whose rows are contracted (MN-major). `to_next_panel`
    // is the distance between panels in bytes.
    DEVICE uint64_t rows(int step, int to_next_panel = kPanelBytes) const {
        return matrix_descriptor(base, to_next_panel, kSwizzleBytes) +
               (step * 16 * kPanelRowBytes >> 4);
    }
};

// ---------------------------------------------------------------------------------------------
// Products of a warpgroup, which multiplies 64 rows. They run in the background until
// `wgmma_wait`.

template <int Columns>
DEVICE void fence_operand(Accumulator<Columns>& x) {
    warpgroup_fence_operand(x.value);
}

template <class Element, int Columns>
DEVICE void fence_operand(Packed<Element, Columns>& x) {
    warpgroup_fence_operand(x.word);
}

// Starts a group of products: fences the registers that `issue` reads and writes, orders them
// before the products, issues these, and closes the group. `issue` may close a group of its own
// earlier with wgmma_commit, to wait for a part of the products first.
template <class Issue, class... Operands>
DEVICE void wgmma_group(const Issue& issue, Operands&... operands) {
    (fence_operand(operands), ...);
    wgmma_fence();
    issue();
    wgmma_commit();
}

// Waits until at most `Pending` of the latest groups are still in flight. The operands are those of
// the groups that have finished.
template <int Pending, class... Operands>
DEVICE void wgmma_wait_for(Operands&... operands) {
    wgmma_wait<Pending>();
    (fence_operand(operands), ...);
}

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
    static_assert(kPartialSwizzleAtoms || D % kPanelColumns == 0);
#pragma unroll
    for (int step = 0; step < K / 16; ++step)
        wgmma<Element, Major::result>(c.value, a.word[step], b.rows(step), true);
}

// One step of c = A B, plus c if `accumulate`, where B has 72 columns: 64 of tile b, and 8 of
// `ones`, which is behind b in memory and holds nothing but ones. `a` is registers, or a descriptor
// with its major.
template <class Element, Major... kMajorA, class A, int K>
DEVICE void multiply_step_with_ones(Accumulator<72>& c, const A& a, const Tile<K, 64>& b, int step,
                                    const Tile<K, 64>& ones, bool accumulate) {
    if constexpr (kPartialSwizzleAtoms) {
        wgmma<Element, kMajorA..., Major::result>(c.value, a, b.rows(step, ones.base - b.base),
                                                  accumulate);
    } else {
        auto& columns = reinterpret_cast<float (&)[8][4]>(c.value);
        auto& sums = reinterpret_cast<float (&)[1][4]>(c.value[8]);
        wgmma<Element, kMajorA..., Major::result>(columns, a, b.rows(step), accumulate);
        // Ones are ones in either order: 8 rows of them are a whole atom.
        wgmma<Element, kMajorA..., Major::contraction>(sums, a, ones.columns(0, 0), accumulate);
    }
}

// c += A [B ones], where B is tile b of 64 columns.
template <class Element, int K>
DEVICE void multiply(Accumulator<72>& c, const Packed<Element, K>& a, const Tile<K, 64>& b,
                     const Tile<K, 64>& ones) {
#pragma unroll
    for (int step = 0; step < K / 16; ++step)
        multiply_step_with_ones<Element>(c, a.word[step], b, step, ones, true);
}

// c = Aᵀ [B ones], where A is 64 columns of a tile and B is tile b of 64 columns.
template <class Element, int K>
DEVICE void multiply_left_transposed(Accumulator<72>& c, const Tile<K, 64>& a, const Tile<K, 64>& b,
                                     const Tile<K, 64>& ones) {
#pragma unroll
    for (int step = 0; step < K / 16; ++step)
        multiply_step_with_ones<Element, Major::result>(c, a.rows(step), b, step, ones, step > 0);
}

}  // namespace jvp_attn::sm90
