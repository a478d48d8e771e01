// The VJP of attention, and of its forward JVP. With cotangents dO, dtO of O, tO, with Tc = T - mu
// and with beta, delta from preprocess.h:
//
//     A  = dO Vᵀ + dtO tVᵀ            Bc = dtO Vᵀ - beta
//     dS = P (A + Bc Tc - delta)      dT = P Bc
//
//     dQ  = s (dS K + dT tK)          dtQ = s dT K
//     dK  = s (dSᵀ Q + dTᵀ tQ)        dtK = s dTᵀ Q
//     dV  = Pᵀ dO + (P Tc)ᵀ dtO       dtV = Pᵀ dtO
//
// Each thread processes a block of keys of one head, with the queries of all heads that share them:
//
//     pack K, tK (transposed and not), V, tV (transposed)
//     for each tile of queries:
//         pack s Q, s tQ, dO, dtO
//         S, T, A, B  = products of packed operands, masked
//         S -> P, T -> P Tc, A -> dS, B -> dT, row by row
//         dQ  += s (dS K + dT tK)     dtQ += s dT K      in memory, ordered by semaphores
//         dK, dV, dtK, dtV += ...                        in the cache
//     write dK, dV, dtK, dtV
//
// Row sums of dS and dT are grad_lse and grad_mu, but only up to the rounding errors of delta and
// beta. Such an error e, f adds e times a weighted mean of K to dQ, which is large if keys have a
// large component in common. `correct_row_sum_bias` subtracts it for each row, at the key k with
// the largest weight: dQ -= s (e k + f tk), dtQ -= s f k.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/aligned_buffer.h"
#include "cpu/backward_workspace.h"
#include "cpu/pack.h"
#include "cpu/softmax.h"
#include "cpu/tiles.h"

namespace jvp_attn::cpu::JVP_ATTN_ISA {

template <class Value>
class Backward {
public:
    struct Tasks {
        explicit Tasks(BackwardWorkspace<Value>& x) : workspace(x), tiles(key_work_tiles(x.p)) {}

        int64_t count() const { return std::ssize(tiles); }

        BackwardWorkspace<Value>& workspace;
        const std::vector<std::vector<KeyBlock>> tiles;
    };

    explicit Backward(Tasks& tasks)
        : tasks_(tasks),
          workspace_(tasks.workspace),
          p_(tasks.workspace.p),
          width_(packed_width<Value>(p_.head_dim)),
          width_v_(packed_width<Value>(p_.head_dim_v)),
          has_t_(p_.tq.data || p_.tk.data || p_.tmask.data),
          has_b_(p_.grad_tout.data || p_.grad_mu.data),
          k_transposed_(kBackwardKeys * p_.head_dim),
          tk_transposed_(kBackwardKeys * p_.head_dim),
          v_transposed_(kBackwardKeys * p_.head_dim_v),
          tv_transposed_(kBackwardKeys * p_.head_dim_v),
          k_(kBackwardKeys * width_),
          tk_(kBackwardKeys * width_),
          dk_(kBackwardKeys * width_),
          dtk_(kBackwardKeys * width_),
          dv_(kBackwardKeys * width_v_),
          dtv_(kBackwardKeys * width_v_),
          q_(kBackwardRows * width_),
          tq_(kBackwardRows * width_),
          dout_(kBackwardRows * width_v_),
          dtout_(kBackwardRows * width_v_),
          s_(kBackwardRows * kScoreStride),
          t_(kBackwardRows * kScoreStride),
          a_(kBackwardRows * kScoreStride),
          b_(kBackwardRows * kScoreStride),
          dq_(kBackwardRows * width_),
          dtq_(kBackwardRows * width_) {}

    void run(int64_t work_tile) {
        for (const KeyBlock& block : tasks_.tiles[work_tile])
            process_keys(SeqlenInfo(p_, block.batch), block.head, block.first, block.keys);
    }

private:
    // One panel more than the keys, as `packed_width`: products with dSᵀ read columns.
    static constexpr int kScoreStride = kBackwardKeys + kPanel<Value>;

    int group() const { return p_.heads / p_.heads_k; }

    MatrixView queries_of(const SeqlenInfo& seqlen, const Tensor& x, int head) const {
        return seqlen.queries_of(x, p_.element, head);
    }

    // ------------------------------------------------------------------------------------------
    // One block of keys, with all queries

    void process_keys(const SeqlenInfo& seqlen, int head_k, int first_key, int keys) {
        const auto of_keys = [&](const Tensor& x) { return seqlen.keys_of(x, p_.element, head_k); };
        // Pack K, V and their tangents.
        pack_transposed<Value>(of_keys(p_.k), first_key, keys, p_.head_dim, k_transposed_);
        pack_transposed<Value>(of_keys(p_.v), first_key, keys, p_.head_dim_v, v_transposed_);
        pack_finite(of_keys(p_.k), first_key, keys, k_);
        if (p_.tk.data) {
            pack_transposed<Value>(of_keys(p_.tk), first_key, keys, p_.head_dim, tk_transposed_);
            pack_finite(of_keys(p_.tk), first_key, keys, tk_);
        }
        if (p_.tv.data)
            pack_transposed<Value>(of_keys(p_.tv), first_key, keys, p_.head_dim_v, tv_transposed_);
        for (Value* sums : {dk_.begin(), dtk_.begin()}) std::fill_n(sums, keys * width_, Value(0));
        for (Value* sums : {dv_.begin(), dtv_.begin()})
            std::fill_n(sums, keys * width_v_, Value(0));

        for (int head = head_k * group(); head < (head_k + 1) * group(); ++head)
            for (int row = 0; row < seqlen.queries; row += kBackwardRows) {
                const int rows = std::min(kBackwardRows, seqlen.queries - row);
                if (seqlen.visible_keys(row + rows - 1) > first_key)
                    process_tile(seqlen, head, row, rows, first_key, keys);
            }

        write_rows(of_keys(p_.grad_k), dk_, first_key, keys, p_.head_dim);
        write_rows(of_keys(p_.grad_tk), dtk_, first_key, keys, p_.head_dim);
        write_rows(of_keys(p_.grad_v), dv_, first_key, keys, p_.head_dim_v);
        write_rows(of_keys(p_.grad_tv), dtv_, first_key, keys, p_.head_dim_v);
    }

    void pack_finite(const MatrixView& m, int first_key, int keys, Value* to) {
        bool nonfinite[kBackwardKeys];
        pack<Value>(m, first_key, keys, p_.head_dim, 1, to);
        zero_nonfinite_rows<Value>(to, keys, p_.head_dim, nonfinite);
    }

    void write_rows(const MatrixView& to, Value* sums, int first_key, int keys, int columns) {
        if (!to) return;
        for (int i = 0; i < keys; ++i)
            write_row(to, first_key + i, columns, sums + i * packed_width<Value>(columns));
    }

    // ------------------------------------------------------------------------------------------
    // One tile of scores

    void process_tile(const SeqlenInfo& seqlen, int head, int row, int rows, int first_key,
                      int keys) {
        const QueryStats<Value>* const stats = workspace_.stats_of(seqlen, head) + row;
        const int padded = round_up_to_panel<Value>(keys);
        compute_scores(seqlen, head, row, rows, padded);
        compute_score_cotangents(seqlen, head, row, rows, padded, stats);

        const MaskOfHead<Value> mask(p_.mask, seqlen.batch, head);
        const MaskOfHead<Value> tmask(p_.tmask, seqlen.batch, head);
        const MaskOfHead<Value> grad_mask(p_.grad_mask, seqlen.batch, head);
        const MaskOfHead<Value> grad_tmask(p_.grad_tmask, seqlen.batch, head);
        for (int i = 0; i < rows; ++i) {
            // Add the masks; compute P, P Tc, dS and dT; add dS and dT to the masks' gradients.
            apply_mask(s_ + i * kScoreStride, seqlen, mask, row + i, first_key, keys);
            if (tmask) tmask.add_to(t_ + i * kScoreStride, row + i, first_key, keys);
            softmax_backward(stats[i], i, padded);
            if (grad_mask) grad_mask.add_from(a_ + i * kScoreStride, row + i, first_key, keys);
            if (grad_tmask) grad_tmask.add_from(b_ + i * kScoreStride, row + i, first_key, keys);
        }
        accumulate_dq(seqlen, head, row, rows, first_key, keys);
        accumulate_dkv(rows, keys);
    }

    void compute_scores(const SeqlenInfo& seqlen, int head, int row, int rows, int padded) {
        const auto pack_queries = [&](const Tensor& x, Value* to) {
            pack(queries_of(seqlen, x, head), row, rows, p_.head_dim, Value(p_.softmax_scale), to);
        };
        // S = s Q Kᵀ
        pack_queries(p_.q, q_);
        gemm_scores<Store::set>(rows, padded, p_.head_dim, q_, k_transposed_, s_);
        // T = s tQ Kᵀ + s Q tKᵀ
        if (p_.tq.data) {
            pack_queries(p_.tq, tq_);
            gemm_scores<Store::set>(rows, padded, p_.head_dim, tq_, k_transposed_, t_);
        } else if (has_t_) {
            std::fill_n(t_.begin(), rows * kScoreStride, Value(0));
        }
        if (p_.tk.data) gemm_scores<Store::add>(rows, padded, p_.head_dim, q_, tk_transposed_, t_);
    }

    void compute_score_cotangents(const SeqlenInfo& seqlen, int head, int row, int rows, int padded,
                                  const QueryStats<Value>* stats) {
        const auto pack_cotangents = [&](const Tensor& x, Value* to) {
            pack(queries_of(seqlen, x, head), row, rows, p_.head_dim_v, Value(1), to);
            zero_fully_masked_rows(stats, rows, to);
        };
        // A = dO Vᵀ
        if (p_.grad_out.data) {
            pack_cotangents(p_.grad_out, dout_);
            gemm_scores<Store::set>(rows, padded, p_.head_dim_v, dout_, v_transposed_, a_);
        } else {
            std::fill_n(a_.begin(), rows * kScoreStride, Value(0));
        }
        // B = dtO Vᵀ, A += dtO tVᵀ
        if (p_.grad_tout.data) {
            pack_cotangents(p_.grad_tout, dtout_);
            gemm_scores<Store::set>(rows, padded, p_.head_dim_v, dtout_, v_transposed_, b_);
            if (p_.tv.data)
                gemm_scores<Store::add>(rows, padded, p_.head_dim_v, dtout_, tv_transposed_, a_);
        } else if (has_b_) {
            std::fill_n(b_.begin(), rows * kScoreStride, Value(0));
        }
    }

    template <Store Mode>
    void gemm_scores(int rows, int columns, int depth, Value* left, Value* right, Value* to) {
        gemm<Mode, Value>(rows, columns, depth, {left, packed_width<Value>(depth), 1},
                          {right, kPanel<Value>, depth * kPanel<Value>}, to, kScoreStride);
    }

    // Cotangents of rows without visible keys have no effect, even if they are NaN.
    void zero_fully_masked_rows(const QueryStats<Value>* stats, int rows, Value* cotangents) const {
        for (int i = 0; i < rows; ++i)
            if (stats[i].lse == kInfinity<Value>)
                std::fill_n(cotangents + i * width_v_, width_v_, Value(0));
    }

    // Replaces S, T, A, B of row i by P, P Tc, dS, dT. Masked keys get 0, even where T, A
    // or B are NaN.
    void softmax_backward(const QueryStats<Value>& row, int i, int columns) {
        Value *const s = s_ + i * kScoreStride, *const t = t_ + i * kScoreStride;
        Value *const a = a_ + i * kScoreStride, *const b = b_ + i * kScoreStride;
        const Vector<Value> zero = {};
        for (int j = 0; j < columns; j += kLanes<Value>) {
            const Vector<Value> score = load(s + j);
            const auto masked = score == -kInfinity<Value>;
            const Vector<Value> p = exp_of_nonpositive<Value>((score - row.lse) - row.lse_lo);
            Vector<Value> x = load(a + j);
            if (has_b_) {
                const Vector<Value> bc = load(b + j) - row.beta;
                if (has_t_) x += bc * (load(t + j) - row.mu);
                store(b + j, masked ? zero : p * bc);
            }
            if (has_t_) store(t + j, masked ? zero : p * (load(t + j) - row.mu));
            store(a + j, masked ? zero : p * (x - row.delta));
            store(s + j, masked ? zero : p);
        }
    }

    // ------------------------------------------------------------------------------------------
    // Gradients of queries

    void accumulate_dq(const SeqlenInfo& seqlen, int head, int row, int rows, int first_key,
                       int keys) {
        const bool has_dq = p_.grad_q.data, has_dtq = p_.grad_tq.data && has_b_;
        const auto gemm_keys = [&]<Store Mode>(Value* weights, Value* right, Value* to) {
            gemm<Mode, Value>(rows, p_.head_dim, keys, {weights, kScoreStride, 1},
                              {right, width_, kPanel<Value>}, to, width_);
        };
        // The terms of this tile: dS K + dT tK and dT K.
        if (has_dq) {
            gemm_keys.template operator()<Store::set>(a_, k_, dq_);
            if (has_b_ && p_.tk.data) gemm_keys.template operator()<Store::add>(b_, tk_, dq_);
        }
        if (has_dtq) gemm_keys.template operator()<Store::set>(b_, k_, dtq_);
        if (!has_dq && !has_dtq) return;

        // Add them to those of earlier keys.
        workspace_.acquire_dq(seqlen, head, row, first_key);
        QueryStats<Value>* const stats = workspace_.stats_of(seqlen, head);
        const MatrixView dq = workspace_.dq_accum(seqlen, head);
        const MatrixView dtq = workspace_.dtq_accum(seqlen, head);
        for (int i = 0; i < rows; ++i) {
            accumulate_row_sums(stats[row + i], i, first_key, keys);
            if (has_dq) add(dq, row + i, p_.softmax_scale, dq_ + i * width_);
            if (has_dtq) add(dtq, row + i, p_.softmax_scale, dtq_ + i * width_);
        }
        // After the last keys, correct and write the sums.
        if (first_key + keys >= seqlen.visible_keys(row + rows - 1)) {
            for (int i = row; i < row + rows; ++i)
                correct_row_sum_bias(seqlen, head / group(), stats[i], i, dq, dtq);
            workspace_.write_dq(seqlen, head, row, rows);
        }
        workspace_.release_dq(seqlen, head, row, first_key);
    }

    // sums[row] += factor * from
    void add(const MatrixView& sums, int row, double factor, const Value* from) const {
        Value* const to = static_cast<Value*>(sums.data) + row * sums.row_stride;
        for (int j = 0; j < p_.head_dim; ++j) to[j] += static_cast<Value>(factor) * from[j];
    }

    // Adds row i of the tile to the statistics of its query.
    void accumulate_row_sums(QueryStats<Value>& row, int i, int first_key, int keys) const {
        const Value* const weights = s_ + i * kScoreStride;
        const int padded = round_up_to_panel<Value>(keys);
        row.ds_row_sum += sum_of(a_ + i * kScoreStride, padded);
        if (has_b_) row.dt_row_sum += sum_of(b_ + i * kScoreStride, padded);
        const Value weight = max_of(weights, padded);
        if (!(weight > row.max_weight)) return;
        row.max_weight = weight;
        row.max_weight_key = first_key + (std::find(weights, weights + keys, weight) - weights);
    }

    // Subtracts from dQ and dtQ what the errors of the row sums of dS and dT have added.
    void correct_row_sum_bias(const SeqlenInfo& seqlen, int head_k, const QueryStats<Value>& row,
                              int i, const MatrixView& dq, const MatrixView& dtq) const {
        if (row.max_weight == 0) return;
        const double e = p_.softmax_scale * (row.ds_row_sum - row.grad_lse);
        const double f = p_.softmax_scale * (row.dt_row_sum - row.grad_mu);
        Value key[256];
        read_row(seqlen.keys_of(p_.k, p_.element, head_k), row.max_weight_key, p_.head_dim, key);
        if (p_.grad_q.data) add(dq, i, -e, key);
        if (!has_b_) return;
        if (p_.grad_tq.data) add(dtq, i, -f, key);
        if (!p_.grad_q.data || !p_.tk.data) return;
        read_row(seqlen.keys_of(p_.tk, p_.element, head_k), row.max_weight_key, p_.head_dim, key);
        add(dq, i, -f, key);
    }

    // ------------------------------------------------------------------------------------------
    // Gradients of keys and values

    void accumulate_dkv(int rows, int keys) {
        const auto gemm_rows = [&](Value* weights, Value* right, int columns, Value* to) {
            const int width = packed_width<Value>(columns);
            gemm<Store::add, Value>(keys, columns, rows, {weights, 1, kScoreStride},
                                    {right, width, kPanel<Value>}, to, width);
        };
        bool nonfinite[kBackwardRows];
        zero_nonfinite_rows<Value>(q_, rows, p_.head_dim, nonfinite);
        if (p_.tq.data) zero_nonfinite_rows<Value>(tq_, rows, p_.head_dim, nonfinite);
        // dK += dSᵀ s Q + dTᵀ s tQ
        if (p_.grad_k.data) {
            gemm_rows(a_, q_, p_.head_dim, dk_);
            if (has_b_ && p_.tq.data) gemm_rows(b_, tq_, p_.head_dim, dk_);
        }
        // dV += Pᵀ dO + (P Tc)ᵀ dtO
        if (p_.grad_v.data) {
            if (p_.grad_out.data) gemm_rows(s_, dout_, p_.head_dim_v, dv_);
            if (has_t_ && p_.grad_tout.data) gemm_rows(t_, dtout_, p_.head_dim_v, dv_);
        }
        // dtK += dTᵀ s Q, dtV += Pᵀ dtO
        if (p_.grad_tk.data && has_b_) gemm_rows(b_, q_, p_.head_dim, dtk_);
        if (p_.grad_tv.data && p_.grad_tout.data) gemm_rows(s_, dtout_, p_.head_dim_v, dtv_);
    }

    Tasks& tasks_;
    BackwardWorkspace<Value>& workspace_;
    const AttentionParams& p_;
    const int width_, width_v_;  // of packed rows
    const bool has_t_, has_b_;   // whether T and B can be nonzero
    AlignedBuffer<Value> k_transposed_, tk_transposed_;
    AlignedBuffer<Value> v_transposed_, tv_transposed_;
    AlignedBuffer<Value> k_, tk_;               // (keys, head_dim)
    AlignedBuffer<Value> dk_, dtk_, dv_, dtv_;  // (keys, head_dim or head_dim_v)
    AlignedBuffer<Value> q_, tq_;               // (rows, head_dim), scaled
    AlignedBuffer<Value> dout_, dtout_;         // (rows, head_dim_v)
    AlignedBuffer<Value> s_, t_, a_, b_;        // (rows, keys)
    AlignedBuffer<Value> dq_, dtq_;             // (rows, head_dim): the terms of one tile
};

}  // namespace jvp_attn::cpu::JVP_ATTN_ISA
