// What the threads of a backward share: the statistics of each query, the float32 sums of dQ and
// dtQ, and the semaphores that order additions to these.
#pragma once

#include <atomic>
#include <vector>

#include "cpu/tiles.h"

namespace jvp_attn::cpu::JVP_ATTN_ISA {

// The scalars of one query.
template <class Value>
struct QueryStats {
    Value lse, lse_lo, mu;  // lse is +inf in a fully masked row, so that exp(S - lse) is 0
    Value grad_lse, grad_mu;
    Value beta;   // dtO·O - grad_mu
    Value delta;  // dO·O + dtO·tO - grad_lse

    // Over the keys so far: the sums of dS and dT, and the largest weight and its key.
    Value ds_row_sum = 0, dt_row_sum = 0;
    Value max_weight = 0;
    int max_weight_key = 0;
};

template <class Value>
class BackwardWorkspace {
public:
    explicit BackwardWorkspace(const AttentionParams& params)
        : p(params), is_half_(sizeof(Value) == sizeof(float) && p.element != Element::float32) {
        int64_t queries = 0, blocks = 0;
        for (int batch = 0; batch < p.batch; ++batch) {
            queries_before_.push_back(queries);
            blocks_before_.push_back(blocks);
            const SeqlenInfo seqlen(p, batch);
            queries += int64_t{p.heads} * seqlen.queries;
            blocks += p.heads * ceil_div(seqlen.queries, kBackwardRows);
        }
        stats_.resize(queries);
        dq_semaphores_ = std::vector<std::atomic<int>>(blocks);
        if (is_half_ && p.grad_q.data) dq_accum_.resize(queries * p.head_dim);
        if (is_half_ && p.grad_tq.data) dtq_accum_.resize(queries * p.head_dim);
    }

    QueryStats<Value>* stats_of(const SeqlenInfo& seqlen, int head) {
        return stats_.data() + first_row(seqlen, head);
    }

    // Where dQ and dtQ of a head are summed: in the gradient itself, unless it is half precision.
    MatrixView dq_accum(const SeqlenInfo& seqlen, int head) {
        return accum_of(seqlen, p.grad_q, dq_accum_, head);
    }
    MatrixView dtq_accum(const SeqlenInfo& seqlen, int head) {
        return accum_of(seqlen, p.grad_tq, dtq_accum_, head);
    }

    // The semaphore of a block of queries counts the blocks of keys that have added to its dQ. They
    // add in ascending order, so results do not depend on the timing of threads.
    void acquire_dq(const SeqlenInfo& seqlen, int head, int row, int key) {
        std::atomic<int>& semaphore = semaphore_of(seqlen, head, row);
        for (int now; (now = semaphore.load(std::memory_order_acquire)) != key / kBackwardKeys;)
            semaphore.wait(now, std::memory_order_acquire);
    }

    void release_dq(const SeqlenInfo& seqlen, int head, int row, int key) {
        std::atomic<int>& semaphore = semaphore_of(seqlen, head, row);
        semaphore.store(key / kBackwardKeys + 1, std::memory_order_release);
        semaphore.notify_all();
    }

    // Rounds the complete sums of some queries of a head to the gradients' dtype.
    void write_dq(const SeqlenInfo& seqlen, int head, int row, int rows) {
        round_rows(seqlen.queries_of(p.grad_q, p.element, head), dq_accum(seqlen, head), row, rows);
        round_rows(seqlen.queries_of(p.grad_tq, p.element, head), dtq_accum(seqlen, head), row,
                   rows);
    }

    const AttentionParams& p;

private:
    int64_t first_row(const SeqlenInfo& seqlen, int head) const {
        return queries_before_[seqlen.batch] + int64_t{head} * seqlen.queries;
    }

    std::atomic<int>& semaphore_of(const SeqlenInfo& seqlen, int head, int row) {
        return dq_semaphores_[blocks_before_[seqlen.batch] +
                              head * ceil_div(seqlen.queries, kBackwardRows) + row / kBackwardRows];
    }

    MatrixView accum_of(const SeqlenInfo& seqlen, const Tensor& gradient, std::vector<float>& accum,
                        int head) {
        if (accum.empty()) return seqlen.queries_of(gradient, p.element, head);
        return {accum.data() + first_row(seqlen, head) * p.head_dim, p.head_dim, Element::float32};
    }

    void round_rows(const MatrixView& gradient, const MatrixView& sums, int row, int rows) {
        if constexpr (std::is_same_v<Value, float>) {
            if (!gradient || !is_half_) return;
            for (int i = row; i < row + rows; ++i)
                write_row(gradient, i, p.head_dim,
                          static_cast<const float*>(sums.data) + i * sums.row_stride);
        }
    }

    const bool is_half_;
    std::vector<int64_t> queries_before_, blocks_before_;  // sums over earlier sequences
    std::vector<QueryStats<Value>> stats_;                 // (batch, head, query)
    std::vector<std::atomic<int>> dq_semaphores_;          // (batch, head, block)
    std::vector<float> dq_accum_, dtq_accum_;              // (batch, head, query, head_dim)
};

}  // namespace jvp_attn::cpu::JVP_ATTN_ISA
