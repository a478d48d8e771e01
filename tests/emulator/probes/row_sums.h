// A small kernel that uses most instructions, with an optional fault.
//
// For each row of 64 bfloat16 it computes the sum of (column + 1) x. Tiles of 32 rows are
// copied asynchronously to shared memory, swizzled. Each warp reads one half of the tile by
// ldmatrix, and stores the sums in shared memory for other threads.
//
// params: q (batch, rows, 64) bfloat16, contiguous; lse (batch, rows) float32, contiguous;
// seqlen_q rows, a multiple of 32. One block for each entry of the batch.
#pragma once

#include "sm80/launch.cuh"

namespace jvp_attn {

enum class Fault {
    none,
    missing_barrier,
    missing_barrier_after_wait,
    overwritten_too_early,
    missing_wait,
    missing_commit,
    unfinished_copies,
    other_swizzle,
    half_a_tile,
    shared_index_out_of_range,
    global_read_out_of_range,
    global_write_out_of_range,
    write_to_an_input,
    two_writers,
    misaligned_copy,
    misaligned_matrix_row,
    misaligned_store,
    divergent_shuffle,
    divergent_instructions,
    divergent_barrier,
    lane_exits_early,
    warp_exits_early,
    endless_loop,
};

template <Fault kFault>
struct RowSums {
    static constexpr int kRows = 32;
    static constexpr int kColumns = 64;
    static constexpr int kChunks = kColumns / 8;
    static constexpr int kTileBytes = kRows * kColumns * 2;
    static constexpr int kThreads = 64;
    static constexpr int kSharedBytes = kTileBytes + kRows * 4;

    static int64_t blocks(const AttentionParams& p) { return p.batch; }

    DEVICE static void run(const AttentionParams& p) {
        const auto* q = static_cast<const uint16_t*>(p.q.data);
        q += int64_t{block_index()} * p.seqlen_q * kColumns;
        float* const result = p.lse.data + block_index() * p.seqlen_q;
        const SharedAddress sums = shared_memory() + kTileBytes;
        const int thread = thread_index();

        for (int first_row = 0; first_row < p.seqlen_q; first_row += kRows) {
            if (kFault != Fault::overwritten_too_early || first_row == 0)
                copy_tile(q + first_row * kColumns);
            if (kFault != Fault::missing_wait) copy_async_wait<0>();
            if (kFault != Fault::missing_barrier_after_wait) wait_for_all();
            if (kFault == Fault::warp_exits_early && thread >= 32) return;
            if (kFault == Fault::lane_exits_early && thread == 5) return;

            const int row = 16 * (1 - thread / 32);  // the first row of the warp
            float sum[2];
            for (int half = 0; half < 2; ++half) sum[half] = 0;
            add_rows(sum, row);
            for (int half = 0; half < 2; ++half) {
                sum[half] = sum_of_quad(sum[half]);
                const int place = row + thread % 32 / 4 + 8 * half +
                                  (kFault == Fault::shared_index_out_of_range ? 1 : 0);
                if (thread % 4 == 0) shared_store_float(sums + 4 * place, sum[half]);
            }
            if (kFault == Fault::overwritten_too_early && first_row + kRows < p.seqlen_q)
                copy_tile(q + (first_row + kRows) * kColumns);

            if (kFault != Fault::missing_barrier) block_barrier();
            if (thread < kRows) store(p, result + first_row, shared_load_float(sums + 4 * thread));
        }
        if (kFault == Fault::unfinished_copies) copy_tile(q);
    }

private:
    DEVICE static int place(int row, int chunk) { return 16 * (kChunks * row + (chunk ^ row % 8)); }

    DEVICE static void copy_tile(const uint16_t* source) {
        if (kFault == Fault::global_read_out_of_range) source += kColumns;
        if (kFault == Fault::misaligned_copy) source += 1;
        constexpr int kAll = kRows * kChunks;
        for (int i = thread_index(); i < (kFault == Fault::half_a_tile ? kAll / 2 : kAll);
             i += kThreads)
            copy_async(shared_memory() + place(i / kChunks, i % kChunks), source + 8 * i, 16);
        if (kFault != Fault::missing_commit) copy_async_commit();
    }

    DEVICE static void wait_for_all() {
        if (kFault == Fault::divergent_barrier && thread_index() < 32) {
            block_barrier();
        } else {
            block_barrier();
        }
        if (kFault == Fault::endless_loop && thread_index() == 7)
            while (shared_load_float(shared_memory()) != -1) {
            }
    }

    // Adds (column + 1) x over the thread's elements of the rows g and g + 8 of 16.
    DEVICE static void add_rows(float (&sum)[2], int first_row) {
        const int lane = thread_index() % 32;
        for (int step = 0; step < kColumns / 16; ++step) {
            const int row = first_row + lane % 16, chunk = 2 * step + lane / 16;
            const int offset =
                kFault == Fault::other_swizzle ? 16 * (kChunks * row + chunk) : place(row, chunk);
            const Words4 x = load_matrices(shared_memory() + offset +
                                           (kFault == Fault::misaligned_matrix_row ? 8 : 0));
            for (int i = 0; i < 4; ++i) {
                const int column = 16 * step + 8 * (i / 2) + 2 * (lane % 4);
                sum[i % 2] += (column + 1) * unpack_low<Bf16>(x.word[i]);
                sum[i % 2] += (column + 2) * unpack_high<Bf16>(x.word[i]);
            }
        }
    }

    DEVICE static float sum_of_quad(float x) {
        if (kFault == Fault::divergent_shuffle && thread_index() % 32 < 16) {
            x += shuffle_xor(x, 1);
        } else if (kFault == Fault::divergent_instructions && thread_index() % 32 < 16) {
            warp_any(x > 0);
        } else {
            x += shuffle_xor(x, 1);
        }
        return x + shuffle_xor(x, 2);
    }

    DEVICE static void store(const AttentionParams& p, float* rows, float sum) {
        const int thread = thread_index();
        if (kFault == Fault::write_to_an_input)
            global_store(static_cast<float*>(p.q.data) + thread, sum);
        else if (kFault == Fault::global_write_out_of_range)
            global_store(rows + p.seqlen_q * p.batch + thread, sum);
        else if (kFault == Fault::two_writers)
            global_store(rows + thread / 2, sum);
        else if (kFault == Fault::misaligned_store)
            global_store(reinterpret_cast<float*>(reinterpret_cast<uint8_t*>(rows + thread) + 2),
                         sum);
        else
            global_store(rows + thread, sum);
    }
};

}  // namespace jvp_attn
