// Backward preprocess: beta and delta of each row.
//
//     beta = dtO·O − dmu      delta = dO·O + dtO·tO − dlse
//
// O and tO include out_lo and tout_lo, the parts that rounding took away: a row of dS must sum to
// dlse, or the mean of K leaks into dQ. A warp computes one row at a time.
#pragma once

#include "common/seqlen.cuh"

namespace jvp_attn {

template <class Element>
struct Preprocess {
    static constexpr int kWarps = 4;
    static constexpr int kRows = 16;
    static constexpr int kThreads = kWarps * 32;
    static constexpr int kSharedBytes = 0;

    static int64_t blocks(const AttentionParams& p) {
        return int64_t{p.batch} * p.heads * ((p.seqlen_q + kRows - 1) / kRows);
    }

    DEVICE static void run(const AttentionParams& p) {
        const int row_blocks = ceil_div(p.seqlen_q, kRows);
        const int head = block_index() / row_blocks % p.heads;
        const SeqlenInfo sequence(p, block_index() / row_blocks / p.heads);
        const int first_row = block_index() % row_blocks * kRows;

        const auto view = [&](const Tensor& x) {
            return sequence.queries_of(x, head, p.head_dim_v);
        };
        const GmemView out = view(p.out), out_lo = view(p.out_lo);
        const GmemView tout = view(p.tout), tout_lo = view(p.tout_lo);
        const GmemView grad_out = view(p.grad_out), grad_tout = view(p.grad_tout);

        const int end = min(first_row + kRows, sequence.queries);
        for (int row = first_row + warp_index(); row < end; row += kWarps) {
            float beta = 0, delta = 0;
            for (int column = 2 * lane_index(); column < p.head_dim_v; column += 64) {
                const Pair o = sum(load_pair<Element>(out, row, column),
                                   load_pair<Element>(out_lo, row, column));
                const Pair to = sum(load_pair<Element>(tout, row, column),
                                    load_pair<Element>(tout_lo, row, column));
                const Pair dout = load_pair<Element>(grad_out, row, column);
                const Pair dtout = load_pair<Element>(grad_tout, row, column);
                beta += dot(dtout, o);
                delta += dot(dout, o) + dot(dtout, to);
            }
            beta = warp_sum(beta);
            delta = warp_sum(delta);
            if (lane_index() == 0) {
                store(sequence.rows_of(p.beta, head), row, beta, sequence.rows_of(p.grad_mu, head));
                store(sequence.rows_of(p.delta, head), row, delta,
                      sequence.rows_of(p.grad_lse, head));
            }
        }
    }

private:
    DEVICE static Pair sum(Pair a, Pair b) { return {a.low + b.low, a.high + b.high}; }

    DEVICE static float dot(Pair a, Pair b) { return a.low * b.low + a.high * b.high; }

    DEVICE static float warp_sum(float x) {
#pragma unroll
        for (int mask = 1; mask < 32; mask *= 2) x += shuffle_xor(x, mask);
        return x;
    }

    // Stores value − cotangent. The statistic and the cotangent may each be absent.
    DEVICE static void store(float* statistic, int row, float value, const float* cotangent) {
        if (!statistic) return;
        global_store(statistic + row, value - (cotangent ? global_load(cotangent + row) : 0));
    }
};

}  // namespace jvp_attn
