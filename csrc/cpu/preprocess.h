// The first step of the backward: the statistics of each query,
//
//     beta = dtO·O - grad_mu        delta = dO·O + dtO·tO - grad_lse.
//
// The dot products are summed in double and include the low-order parts of O and tO.
#pragma once

#include <vector>

#include "cpu/backward_workspace.h"
#include "cpu/tiles.h"

namespace jvp_attn::cpu::JVP_ATTN_ISA {

template <class Value>
class Preprocess {
public:
    struct Tasks {
        explicit Tasks(BackwardWorkspace<Value>& x)
            : workspace(x), blocks(row_blocks(x.p, kBackwardRows)) {}

        int64_t count() const { return std::ssize(blocks); }

        BackwardWorkspace<Value>& workspace;
        const std::vector<RowBlock> blocks;
    };

    explicit Preprocess(Tasks& tasks) : tasks_(tasks), p_(tasks.workspace.p) {}

    void run(int64_t work_tile) {
        const RowBlock& block = tasks_.blocks[work_tile];
        const SeqlenInfo seqlen(p_, block.batch);
        const auto matrix = [&](const Tensor& x) {
            return seqlen.queries_of(x, p_.element, block.head);
        };
        const auto row_vector = [&](const RowVector& x) {
            return seqlen.template rows_of<Value>(x, block.head);
        };
        const MatrixView out = matrix(p_.out), out_lo = matrix(p_.out_lo);
        const MatrixView tout = matrix(p_.tout), tout_lo = matrix(p_.tout_lo);
        const MatrixView grad_out = matrix(p_.grad_out), grad_tout = matrix(p_.grad_tout);
        const Value *const lse = row_vector(p_.lse), *const lse_lo = row_vector(p_.lse_lo);
        const Value* const mu = row_vector(p_.mu);
        const Value* const grad_lse = row_vector(p_.grad_lse);
        const Value* const grad_mu = row_vector(p_.grad_mu);
        QueryStats<Value>* const stats = tasks_.workspace.stats_of(seqlen, block.head);
        for (int i = block.first; i < block.first + block.rows; ++i) {
            QueryStats<Value>& row = stats[i];
            const bool fully_masked = lse[i] == -kInfinity<Value>;
            row.lse = fully_masked ? kInfinity<Value> : lse[i];
            row.grad_lse = fully_masked || !grad_lse ? 0 : grad_lse[i];
            row.grad_mu = fully_masked || !grad_mu ? 0 : grad_mu[i];
            row.lse_lo = lse_lo ? lse_lo[i] : 0;
            row.mu = mu ? mu[i] : 0;
            row.beta = dot(grad_tout, out, out_lo, i) - row.grad_mu;
            row.delta =
                dot(grad_out, out, out_lo, i) + dot(grad_tout, tout, tout_lo, i) - row.grad_lse;
        }
    }

private:
    // a · (b + b_lo) of one row; 0 if a or b is absent.
    Value dot(const MatrixView& a, const MatrixView& b, const MatrixView& b_lo, int row) const {
        if (!a || !b) return 0;
        Value x[256], y[256];
        read_row(a, row, p_.head_dim_v, x);
        read_row(b, row, p_.head_dim_v, y);
        double sum = 0;
        for (int j = 0; j < p_.head_dim_v; ++j) sum += static_cast<double>(x[j]) * y[j];
        if (b_lo) {
            read_row(b_lo, row, p_.head_dim_v, y);
            for (int j = 0; j < p_.head_dim_v; ++j) sum += static_cast<double>(x[j]) * y[j];
        }
        return static_cast<Value>(sum);
    }

    Tasks& tasks_;
    const AttentionParams& p_;
};

}  // namespace jvp_attn::cpu::JVP_ATTN_ISA
