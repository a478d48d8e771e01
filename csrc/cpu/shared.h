// What the threads of a backward share about queries: their statistics, which are computed first,
// the sums of their gradients, and whose turn it is to add to them.
#pragma once

#include <atomic>
#include <vector>

#include "cpu/tiles.h"

namespace jvp_attn::cpu::JVP_ATTN_ISA {

// What a query has besides its vectors.
template <class Value>
struct QueryStatistics {
    Value lse, lse_lo, mu;
    Value g_lse, g_mu;
    Value beta;   // dtO·O - g_mu
    Value delta;  // dO·O + dtO·tO - g_lse

    // Of the keys so far: sums of dS and dT, the largest weight and whose it is.
    Value ds = 0, dt = 0;
    Value largest_weight = 0;
    int heaviest_key = 0;
};

template <class Value>
class Shared {
public:
    explicit Shared(const AttentionParams& params)
        : p(params), is_rounded_(sizeof(Value) == sizeof(float) && p.element != Element::float32) {
        int64_t queries = 0, blocks = 0;
        for (int batch = 0; batch < p.batch; ++batch) {
            queries_before_.push_back(queries);
            blocks_before_.push_back(blocks);
            const Sequence sequence(p, batch);
            queries += int64_t{p.heads} * sequence.queries;
            blocks += p.heads * tiles_of(sequence.queries, kBackwardRows);
        }
        statistics_.resize(queries);
        turns_ = std::vector<std::atomic<int>>(blocks);
        if (is_rounded_ && p.grad_q.data) sum_gq_.resize(queries * p.head_dim);
        if (is_rounded_ && p.grad_tq.data) sum_gtq_.resize(queries * p.head_dim);
    }

    QueryStatistics<Value>* statistics_of(const Sequence& sequence, int head) {
        return statistics_.data() + place(sequence, head);
    }

    // Where the gradient of the queries of a head is summed: in itself, if it is not rounded.
    Matrix sums_of_gq(const Sequence& sequence, int head) {
        return sums_of(sequence, p.grad_q, sum_gq_, head);
    }
    Matrix sums_of_gtq(const Sequence& sequence, int head) {
        return sums_of(sequence, p.grad_tq, sum_gtq_, head);
    }

    // Blocks of keys add to the sums of a block of queries one after the other, in their order, so
    // that results do not depend on who is faster.
    void wait_for_turn(const Sequence& sequence, int head, int row, int key) {
        std::atomic<int>& turn = turn_of(sequence, head, row);
        for (int now; (now = turn.load(std::memory_order_acquire)) != key / kBackwardKeys;)
            turn.wait(now, std::memory_order_acquire);
    }

    void end_turn(const Sequence& sequence, int head, int row, int key) {
        std::atomic<int>& turn = turn_of(sequence, head, row);
        turn.store(key / kBackwardKeys + 1, std::memory_order_release);
        turn.notify_all();
    }

    // Write the sums of some queries of a head, which are complete, as gradients.
    void round(const Sequence& sequence, int head, int row, int rows) {
        round(sequence.queries_of(p.grad_q, p.element, head), sums_of_gq(sequence, head), row,
              rows);
        round(sequence.queries_of(p.grad_tq, p.element, head), sums_of_gtq(sequence, head), row,
              rows);
    }

    const AttentionParams& p;

private:
    int64_t place(const Sequence& sequence, int head) const {
        return queries_before_[sequence.batch] + int64_t{head} * sequence.queries;
    }

    std::atomic<int>& turn_of(const Sequence& sequence, int head, int row) {
        return turns_[blocks_before_[sequence.batch] +
                      head * tiles_of(sequence.queries, kBackwardRows) + row / kBackwardRows];
    }

    Matrix sums_of(const Sequence& sequence, const Tensor& gradient, std::vector<float>& sums,
                   int head) {
        if (sums.empty()) return sequence.queries_of(gradient, p.element, head);
        return {sums.data() + place(sequence, head) * p.head_dim, p.head_dim, Element::float32};
    }

    void round(const Matrix& gradient, const Matrix& sums, int row, int rows) {
        if constexpr (std::is_same_v<Value, float>) {
            if (!gradient || !is_rounded_) return;
            for (int i = row; i < row + rows; ++i)
                write_row(gradient, i, p.head_dim,
                          static_cast<const float*>(sums.data) + i * sums.row_stride);
        }
    }

    const bool is_rounded_;
    std::vector<int64_t> queries_before_, blocks_before_;  // of all heads, by sequence
    std::vector<QueryStatistics<Value>> statistics_;       // (sequence, head, query)
    std::vector<std::atomic<int>> turns_;                  // (sequence, head, block)
    std::vector<float> sum_gq_, sum_gtq_;                  // (sequence, head, query, head_dim)
};

// Computes the statistics, some rows of one head at a time.
template <class Value>
class Preparation {
public:
    struct Tasks {
        explicit Tasks(Shared<Value>& x) : shared(x), blocks(row_blocks(x.p, kBackwardRows)) {}

        int64_t count() const { return std::ssize(blocks); }

        Shared<Value>& shared;
        const std::vector<RowBlock> blocks;
    };

    explicit Preparation(Tasks& tasks) : tasks_(tasks), p_(tasks.shared.p) {}

    void run(int64_t piece) {
        const RowBlock& block = tasks_.blocks[piece];
        const Sequence sequence(p_, block.batch);
        const auto matrix = [&](const Tensor& x) {
            return sequence.queries_of(x, p_.element, block.head);
        };
        const auto row_vector = [&](const RowVector& x) {
            return sequence.template rows_of<Value>(x, block.head);
        };
        const Matrix out = matrix(p_.out), residual = matrix(p_.out_lo);
        const Matrix tout = matrix(p_.tout), tresidual = matrix(p_.tout_lo);
        const Matrix g_out = matrix(p_.grad_out), g_tout = matrix(p_.grad_tout);
        const Value *const lse = row_vector(p_.lse), *const mu = row_vector(p_.mu);
        const Value* const lse_lo = row_vector(p_.lse_lo);
        const Value *const g_lse = row_vector(p_.grad_lse), *const g_mu = row_vector(p_.grad_mu);
        QueryStatistics<Value>* const rows = tasks_.shared.statistics_of(sequence, block.head);
        for (int i = block.first; i < block.first + block.rows; ++i) {
            QueryStatistics<Value>& row = rows[i];
            const bool is_dead = lse[i] == -kInfinity<Value>;
            // exp(S - inf) is 0.
            row.lse = is_dead ? kInfinity<Value> : lse[i];
            row.g_lse = is_dead || !g_lse ? 0 : g_lse[i];
            row.g_mu = is_dead || !g_mu ? 0 : g_mu[i];
            row.lse_lo = lse_lo ? lse_lo[i] : 0;
            row.mu = mu ? mu[i] : 0;
            row.beta = dot(g_tout, out, residual, i) - row.g_mu;
            row.delta = dot(g_out, out, residual, i) + dot(g_tout, tout, tresidual, i) - row.g_lse;
        }
    }

private:
    Value dot(const Matrix& a, const Matrix& b, const Matrix& residual, int row) const {
        if (!a || !b) return 0;
        Value x[256], y[256];
        read_row(a, row, p_.head_dim_v, x);
        read_row(b, row, p_.head_dim_v, y);
        double sum = 0;
        for (int j = 0; j < p_.head_dim_v; ++j) sum += static_cast<double>(x[j]) * y[j];
        if (residual) {
            read_row(residual, row, p_.head_dim_v, y);
            for (int j = 0; j < p_.head_dim_v; ++j) sum += static_cast<double>(x[j]) * y[j];
        }
        return static_cast<Value>(sum);
    }

    Tasks& tasks_;
    const AttentionParams& p_;
};

}  // namespace jvp_attn::cpu::JVP_ATTN_ISA
