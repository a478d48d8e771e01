// Tiles of elements in shared memory: filled by cp.async, multiplied by mma.
#pragma once

#include "common/gmem.cuh"

namespace jvp_attn {

template <int Rows, int Columns>
struct Tile {
    static constexpr int kRows = Rows;
    static constexpr int kColumns = Columns;
    static constexpr int kChunks = Columns / 8;  // of 16 bytes in a row
    static constexpr int kBytes = Rows * Columns * 2;

    SharedAddress base;

    // Chunks are swizzled within groups of a row, so that the same chunk of 8 successive rows,
    // which ldmatrix reads together, uses all banks.
    static constexpr int kGroup = kChunks % 8 == 0 ? 8 : 4;

    DEVICE static int place(int row, int chunk) {
        const int twist = kGroup == 8 ? row % 8 : row / 2 % 4;
        return (row * kChunks + (chunk ^ twist)) * 16;
    }

    DEVICE SharedAddress chunk(int row, int chunk) const { return base + place(row, chunk); }

    // 16 x 16 elements as the left factor of `multiply_add`.
    DEVICE Words4 left(int row, int step) const {
        const int lane = lane_index();
        return load_matrices(moved(place(lane % 16, lane / 16), row, 2 * step));
    }

    // 16 rows x 16 columns as the right factor of A Bᵀ: words 0 and 1 are the first 8 rows.
    DEVICE Words4 right_transposed(int row, int step) const {
        const int lane = lane_index();
        return load_matrices(moved(place(lane % 8 + lane / 16 * 8, lane / 8 % 2), row, 2 * step));
    }

    // 16 rows x 16 columns as the right factor of A B: words 0 and 1 are the first 8 columns.
    DEVICE Words4 right(int row, int step) const {
        const int lane = lane_index();
        return load_matrices_transposed(moved(place(lane % 16, lane / 16), row, 2 * step));
    }

private:
    // The address of a place moved by a multiple of 16 rows and of 2 chunks. It costs one
    // instruction: the place of a lane is computed once, the rest is constant.
    DEVICE SharedAddress moved(int place, int rows, int chunks) const {
        const int groups = chunks / kGroup * kGroup;
        return base + (rows * kChunks + groups) * 16 + (place ^ (chunks - groups) * 16);
    }
};

// ---------------------------------------------------------------------------------------------
// Loading

// Eight elements of a row from any address, zeros beyond the matrix.
DEVICE Words4 gather_chunk(const GmemView& matrix, int row, int column) {
    uint32_t element[8] = {};
    if (row < matrix.rows) {
#pragma unroll
        for (int e = 0; e < 8; ++e)
            if (column + e < matrix.columns)
                element[e] = global_load(matrix.element(row, column + e));
    }
    Words4 words;
#pragma unroll
    for (int w = 0; w < 4; ++w) words.word[w] = element[2 * w] | element[2 * w + 1] << 16;
    return words;
}

// Fills a tile with the rows from `first_row` on, zeros beyond the matrix. All threads of the block
// take part; the tile can be read after `copy_async_wait` and a barrier.
template <int Threads, int Rows, int Columns>
DEVICE void load_tile(const Tile<Rows, Columns>& tile, const GmemView& matrix, int first_row) {
    using T = Tile<Rows, Columns>;
    // In each round the threads take a group of chunks of so many rows, a multiple of 8: from round
    // to round both addresses of a thread move by the same distance.
    constexpr int kRowsAtOnce = Threads / T::kGroup;
    static_assert(kRowsAtOnce % 8 == 0, "places repeat every 8 rows");
    const int thread_row = thread_index() / T::kGroup;
    const int thread_chunk = thread_index() % T::kGroup;
    const SharedAddress target = tile.base + T::place(thread_row, thread_chunk);
    const int row = first_row + thread_row;
    if (matrix.aligned_to(16)) {
        const uint16_t* source = matrix.element(row, 8 * thread_chunk);
#pragma unroll
        for (int round = 0; round < Rows; round += kRowsAtOnce) {
            if (Rows % kRowsAtOnce != 0 && thread_row + round >= Rows) break;  // too many threads
#pragma unroll
            for (int group = 0; group < T::kChunks; group += T::kGroup) {
                const int columns = matrix.columns - 8 * (group + thread_chunk);
                const int bytes = row + round < matrix.rows ? 2 * min(max(columns, 0), 8) : 0;
                copy_async(target + (round * T::kChunks + group) * 16, source + 8 * group, bytes);
            }
            source += kRowsAtOnce * matrix.row_stride;
        }
    } else {
        // No asynchronous copy of 16 bytes can start here.
#pragma unroll 1
        for (int round = 0; thread_row + round < Rows; round += kRowsAtOnce)
#pragma unroll 1
            for (int group = 0; group < T::kChunks; group += T::kGroup)
                shared_store_words4(target + (round * T::kChunks + group) * 16,
                                    gather_chunk(matrix, row + round, 8 * (group + thread_chunk)));
    }
}

// ---------------------------------------------------------------------------------------------
// Products. A warp multiplies 16 rows.

// c += A Bᵀ, where A is 16 rows of a tile.
template <class Element, int N, int M, int D>
DEVICE void multiply_transposed(Accumulator<N>& c, const Tile<M, D>& a, int row,
                                const Tile<N, D>& b) {
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
        const Words4 left = a.left(row, step);
#pragma unroll
        for (int n = 0; n < N / 16; ++n) {
            const Words4 right = b.right_transposed(16 * n, step);
            multiply_add<Element>(c.value[2 * n], left, right.word[0], right.word[1]);
            multiply_add<Element>(c.value[2 * n + 1], left, right.word[2], right.word[3]);
        }
    }
}

// c0 += A0 Bᵀ and c1 += A1 Bᵀ, reading B once.
template <class Element, int N, int M, int D>
DEVICE void multiply_transposed(Accumulator<N>& c0, const Tile<M, D>& a0, Accumulator<N>& c1,
                                const Tile<M, D>& a1, int row, const Tile<N, D>& b) {
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
        const Words4 left0 = a0.left(row, step);
        const Words4 left1 = a1.left(row, step);
#pragma unroll
        for (int n = 0; n < N / 16; ++n) {
            const Words4 right = b.right_transposed(16 * n, step);
            multiply_add<Element>(c0.value[2 * n], left0, right.word[0], right.word[1]);
            multiply_add<Element>(c0.value[2 * n + 1], left0, right.word[2], right.word[3]);
            multiply_add<Element>(c1.value[2 * n], left1, right.word[0], right.word[1]);
            multiply_add<Element>(c1.value[2 * n + 1], left1, right.word[2], right.word[3]);
        }
    }
}

// c += A Bᵀ and dc += dA Bᵀ + A dBᵀ, where dA and dB may be absent.
template <class Element, int N, int M, int D>
DEVICE void multiply_transposed_with_tangent(Accumulator<N>& c, Accumulator<N>& dc,
                                             const Tile<M, D>& a, const Tile<M, D>& da, bool has_da,
                                             int row, const Tile<N, D>& b, const Tile<N, D>& db,
                                             bool has_db) {
    if (has_da)
        multiply_transposed<Element>(c, a, dc, da, row, b);
    else
        multiply_transposed<Element>(c, a, row, b);
    if (has_db) multiply_transposed<Element>(dc, a, row, db);
}

// c += A B.
template <class Element, int K, int D>
DEVICE void multiply(Accumulator<D>& c, const Packed<Element, K>& a, const Tile<K, D>& b) {
#pragma unroll
    for (int step = 0; step < K / 16; ++step) {
        const Words4 left = a.fragment(step);
#pragma unroll
        for (int n = 0; n < D / 16; ++n) {
            const Words4 right = b.right(16 * step, n);
            multiply_add<Element>(c.value[2 * n], left, right.word[0], right.word[1]);
            multiply_add<Element>(c.value[2 * n + 1], left, right.word[2], right.word[3]);
        }
    }
}

// c0 += A0 B and c1 += A1 B, reading B once.
template <class Element, int K, int D>
DEVICE void multiply(Accumulator<D>& c0, const Packed<Element, K>& a0, Accumulator<D>& c1,
                     const Packed<Element, K>& a1, const Tile<K, D>& b) {
#pragma unroll
    for (int step = 0; step < K / 16; ++step) {
        const Words4 left0 = a0.fragment(step);
        const Words4 left1 = a1.fragment(step);
#pragma unroll
        for (int n = 0; n < D / 16; ++n) {
            const Words4 right = b.right(16 * step, n);
            multiply_add<Element>(c0.value[2 * n], left0, right.word[0], right.word[1]);
            multiply_add<Element>(c0.value[2 * n + 1], left0, right.word[2], right.word[3]);
            multiply_add<Element>(c1.value[2 * n], left1, right.word[0], right.word[1]);
            multiply_add<Element>(c1.value[2 * n + 1], left1, right.word[2], right.word[3]);
        }
    }
}

}  // namespace jvp_attn
