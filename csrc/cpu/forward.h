// The forward of attention and its JVP in one pass over the keys: FlashAttention (arXiv 2205.14135)
// with tangents.
//
//     S = s Q Kᵀ + mask                   P = exp(S - lse)    O  = P V
//     T = s (tQ Kᵀ + Q tKᵀ) + tmask       mu = rowsum(P T)    tO = (P (T - mu)) V + P tV
//
// Each thread processes a block of rows of one head:
//
//     pack s Q and s tQ
//     for each tile of keys:
//         pack K, tK (transposed), V, tV; zero the rows of V, tV that are not finite, remember them
//         for each tile of rows:
//             S, T     = products of packed operands, masked
//             online softmax: raise the row maximum, rescale O and tO, S -> P, T -> P (T - centre)
//             O += P V      tO += P (T - centre) V + P tV
//     divide by the row sum; tO -= (mu - centre) O; add NaN to rows that see a value not finite
#pragma once

#include <vector>

#include "cpu/aligned_buffer.h"
#include "cpu/forward_tasks.h"
#include "cpu/pack.h"
#include "cpu/softmax.h"
#include "cpu/tiles.h"

namespace jvp_attn::cpu::JVP_ATTN_ISA {

template <class Value>
class Forward {
public:
    using Tasks = ForwardTasks<Value>;

    explicit Forward(Tasks& tasks)
        : tasks_(tasks),
          p_(tasks.p),
          width_(packed_width<Value>(p_.head_dim)),
          width_v_(packed_width<Value>(p_.head_dim_v)),
          has_t_(p_.tq.data || p_.tk.data || p_.tmask.data),
          q_(tasks.tiles * kForwardRows * width_),
          tq_(tasks.tiles * kForwardRows * width_),
          k_(kForwardKeys * p_.head_dim),
          tk_(kForwardKeys * p_.head_dim),
          v_(kForwardKeys * width_v_),
          tv_(kForwardKeys * width_v_),
          s_(kForwardRows * kForwardKeys),
          t_(kForwardRows * kForwardKeys),
          out_(tasks.tiles * kForwardRows * width_v_),
          tout_(tasks.tiles * kForwardRows * width_v_),
          softmax_(tasks.tiles * kForwardRows) {}

    void run(int64_t work_tile) {
        const int64_t block = work_tile / tasks_.splits;
        const RowBlock& rows = tasks_.blocks[block];
        head_ = rows.head, first_ = rows.first, rows_ = rows.rows;
        const SeqlenInfo seqlen(p_, rows.batch);
        const int keys = seqlen.visible_keys(first_ + rows_ - 1);
        const int length = ceil_div(ceil_div(keys, kForwardKeys), tasks_.splits) * kForwardKeys;
        const int start_key = work_tile % tasks_.splits * length;
        const int end_key = std::min(start_key + length, keys);

        pack_queries(seqlen);
        clear();
        for (int key = start_key; key < end_key; key += kForwardKeys)
            process_keys(seqlen, key, std::min(kForwardKeys, end_key - key));
        if (tasks_.splits == 1 || merge_splits(block, work_tile)) write_outputs(seqlen);
    }

private:
    using Split = typename Tasks::Split;

    void pack_queries(const SeqlenInfo& seqlen) {
        const auto factor = static_cast<Value>(p_.softmax_scale);
        pack<Value>(seqlen.queries_of(p_.q, p_.element, head_), first_, rows_, p_.head_dim, factor,
                    q_);
        if (p_.tq.data)
            pack<Value>(seqlen.queries_of(p_.tq, p_.element, head_), first_, rows_, p_.head_dim,
                        factor, tq_);
    }

    void clear() {
        std::fill_n(out_.begin(), rows_ * width_v_, Value(0));
        if (p_.tout.data) std::fill_n(tout_.begin(), rows_ * width_v_, Value(0));
        std::fill_n(softmax_.begin(), rows_, OnlineSoftmax<Value>());
    }

    // ------------------------------------------------------------------------------------------
    // One tile of keys, with all rows of the block

    void process_keys(const SeqlenInfo& seqlen, int first_key, int keys) {
        const int head_k = head_ / (p_.heads / p_.heads_k);
        const auto of_keys = [&](const Tensor& x) { return seqlen.keys_of(x, p_.element, head_k); };
        // Pack K and tK transposed, V and tV as they are.
        pack_transposed<Value>(of_keys(p_.k), first_key, keys, p_.head_dim, k_);
        if (p_.tk.data) pack_transposed<Value>(of_keys(p_.tk), first_key, keys, p_.head_dim, tk_);
        pack<Value>(of_keys(p_.v), first_key, keys, p_.head_dim_v, 1, v_);
        if (p_.tv.data) pack<Value>(of_keys(p_.tv), first_key, keys, p_.head_dim_v, 1, tv_);

        // Zero what is not finite; rows that see it become NaN at the end.
        bool nonfinite[kForwardKeys], tnonfinite[kForwardKeys];
        const bool any = zero_nonfinite_rows<Value>(v_, keys, p_.head_dim_v, nonfinite);
        const bool any_t =
            p_.tv.data && zero_nonfinite_rows<Value>(tv_, keys, p_.head_dim_v, tnonfinite);

        for (int row = 0; row < rows_; row += kForwardRows) {
            const int rows = std::min(kForwardRows, rows_ - row);
            const int visible = seqlen.visible_keys(first_ + row + rows - 1) - first_key;
            if (visible <= 0) continue;
            const int tile_keys = std::min(keys, visible);
            compute_scores(seqlen, row, rows, first_key, tile_keys);
            if (any) propagate_nan(nonfinite, row, rows, tile_keys, &OnlineSoftmax<Value>::nan);
            if (any) propagate_nan(nonfinite, row, rows, tile_keys, &OnlineSoftmax<Value>::tnan);
            if (any_t) propagate_nan(tnonfinite, row, rows, tile_keys, &OnlineSoftmax<Value>::tnan);
            accumulate_outputs(row, rows, tile_keys);
        }
    }

    void compute_scores(const SeqlenInfo& seqlen, int row, int rows, int first_key, int keys) {
        const int padded = round_up_to_panel<Value>(keys);
        // S = s Q Kᵀ
        gemm_scores<Store::set>(rows, padded, q_ + row * width_, k_, s_);
        // T = s tQ Kᵀ + s Q tKᵀ
        if (p_.tq.data)
            gemm_scores<Store::set>(rows, padded, tq_ + row * width_, k_, t_);
        else if (has_t_)
            std::fill_n(t_.begin(), rows * kForwardKeys, Value(0));
        if (p_.tk.data) gemm_scores<Store::add>(rows, padded, q_ + row * width_, tk_, t_);

        // Add the masks: S of masked keys is -inf, T is 0.
        const MaskOfHead<Value> mask(p_.mask, seqlen.batch, head_);
        const MaskOfHead<Value> tmask(p_.tmask, seqlen.batch, head_);
        for (int i = 0; i < rows; ++i) {
            Value *const s = s_ + i * kForwardKeys, *const t = t_ + i * kForwardKeys;
            apply_mask(s, seqlen, mask, first_ + row + i, first_key, keys);
            if (tmask) tmask.add_to(t, first_ + row + i, first_key, keys);
            if (has_t_) zero_masked_tangents(t, s, padded);
        }
    }

    void accumulate_outputs(int row, int rows, int keys) {
        const int padded = round_up_to_panel<Value>(keys);
        Value *const out = out_ + row * width_v_, *const tout = tout_ + row * width_v_;
        for (int i = 0; i < rows; ++i) {
            Value *const s = s_ + i * kForwardKeys, *const t = t_ + i * kForwardKeys;
            OnlineSoftmax<Value>& softmax = softmax_[row + i];
            // Raise the row maximum and rescale O and tO.
            const Value factor = softmax.update_max(max_of(s, padded));
            if (factor != 1) {
                scale(out + i * width_v_, width_v_, factor);
                if (p_.tout.data) scale(tout + i * width_v_, width_v_, factor);
            }
            // S becomes P, T becomes P (T - centre).
            if (has_t_)
                softmax.update(s, t, padded);
            else
                softmax.update(s, padded);
        }
        // O += P V, tO += P (T - centre) V + P tV
        gemm_values(s_, rows, keys, v_, out);
        if (has_t_) gemm_values(t_, rows, keys, v_, tout);
        if (p_.tv.data) gemm_values(s_, rows, keys, tv_, tout);
    }

    template <Store Mode>
    void gemm_scores(int rows, int columns, Value* left, Value* right, Value* to) {
        gemm<Mode, Value>(rows, columns, p_.head_dim, {left, width_, 1},
                          {right, kPanel<Value>, p_.head_dim * kPanel<Value>}, to, kForwardKeys);
    }

    void gemm_values(Value* weights, int rows, int keys, Value* values, Value* to) {
        gemm<Store::add, Value>(rows, p_.head_dim_v, keys, {weights, kForwardKeys, 1},
                                {values, width_v_, kPanel<Value>}, to, width_v_);
    }

    // Marks the rows that see a key whose value is not finite.
    void propagate_nan(const bool* nonfinite, int row, int rows, int keys,
                       Value OnlineSoftmax<Value>::* nan) {
        for (int i = 0; i < rows; ++i)
            for (int j = 0; j < keys; ++j)
                if (nonfinite[j] && s_[i * kForwardKeys + j] != -kInfinity<Value>)
                    softmax_[row + i].*nan = std::numeric_limits<Value>::quiet_NaN();
    }

    // ------------------------------------------------------------------------------------------
    // Epilogue

    // Stores this split. If it is the last of its block to finish, merges all and returns true.
    bool merge_splits(int64_t block, int64_t work_tile) {
        Split& own = tasks_.split_results[work_tile];
        std::copy_n(softmax_.begin(), rows_, own.softmax);
        std::copy_n(out_.begin(), rows_ * width_v_, own.out.begin());
        if (p_.tout.data) std::copy_n(tout_.begin(), rows_ * width_v_, own.tout.begin());
        if (--tasks_.unfinished[block] > 0) return false;

        clear();
        for (int i = 0; i < tasks_.splits; ++i)
            merge(tasks_.split_results[block * tasks_.splits + i]);
        return true;
    }

    void merge(Split& split) {
        for (int i = 0; i < rows_; ++i) {
            const auto [own, other, shift] = softmax_[i].merge(split.softmax[i]);
            for (int j = i * width_v_; j < i * width_v_ + p_.head_dim_v; ++j) {
                out_[j] = own * out_[j] + other * split.out[j];
                if (p_.tout.data)
                    tout_[j] = own * tout_[j] + other * (split.tout[j] + shift * split.out[j]);
            }
        }
    }

    void write_outputs(const SeqlenInfo& seqlen) {
        const MatrixView out = seqlen.queries_of(p_.out, p_.element, head_);
        const MatrixView tout = seqlen.queries_of(p_.tout, p_.element, head_);
        const MatrixView out_lo = seqlen.queries_of(p_.out_lo, p_.element, head_);
        const MatrixView tout_lo = seqlen.queries_of(p_.tout_lo, p_.element, head_);
        Value* const lse = seqlen.template rows_of<Value>(p_.lse, head_);
        Value* const lse_lo = seqlen.template rows_of<Value>(p_.lse_lo, head_);
        Value* const mu = seqlen.template rows_of<Value>(p_.mu, head_);
        for (int i = 0; i < rows_; ++i) {
            const OnlineSoftmax<Value>& softmax = softmax_[i];
            const int row = first_ + i;
            Value *const o = out_ + i * width_v_, *const to = tout_ + i * width_v_;
            const bool fully_masked = softmax.row_sum == 0;
            const Value factor = fully_masked ? 0 : 1 / softmax.row_sum;
            // mu - centre
            const Value mean = softmax.trow_sum * factor;
            const double max = softmax.row_max;
            const double log_sum = std::log(static_cast<double>(softmax.row_sum));
            lse[row] = fully_masked ? -kInfinity<Value> : static_cast<Value>(max + log_sum);
            // In this order the logarithm is not lost beside a huge maximum.
            if (lse_lo) lse_lo[row] = fully_masked ? 0 : (max - lse[row]) + log_sum;
            for (int j = 0; j < p_.head_dim_v; ++j) o[j] = o[j] * factor + softmax.nan;
            if (tout) {
                mu[row] = softmax.centre + mean;
                for (int j = 0; j < p_.head_dim_v; ++j)
                    to[j] = to[j] * factor - mean * o[j] + softmax.tnan;
                write_row(tout, tout_lo, row, p_.head_dim_v, to);
            }
            write_row(out, out_lo, row, p_.head_dim_v, o);
        }
    }

    Tasks& tasks_;
    const AttentionParams& p_;
    const int width_, width_v_;        // of packed rows
    const bool has_t_;                 // whether T can be nonzero
    AlignedBuffer<Value> q_, tq_;      // (rows of the block, head_dim), scaled
    AlignedBuffer<Value> k_, tk_;      // transposed
    AlignedBuffer<Value> v_, tv_;      // (keys, head_dim_v)
    AlignedBuffer<Value> s_, t_;       // (rows, keys): S and T, then P and P (T - centre)
    AlignedBuffer<Value> out_, tout_;  // (rows of the block, head_dim_v), in units of exp(row_max)
    std::vector<OnlineSoftmax<Value>> softmax_;  // (rows of the block)
    int head_ = 0, first_ = 0, rows_ = 0;        // of the block
};

}  // namespace jvp_attn::cpu::JVP_ATTN_ISA
