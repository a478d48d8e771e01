// O = P V and lse; with tangents also tO = (P (T - mu)) V + P tV and mu, in the same pass over the
// keys. A thread takes some rows of one head at a time, and they meet the keys tile by tile:
// FlashAttention (arXiv 2205.14135) with tangents. Where there are few rows and many keys, it takes
// a part of the keys, and who finishes the last part joins them all, in their order.
#pragma once

#include <atomic>
#include <vector>

#include "cpu/scratch.h"
#include "cpu/softmax.h"
#include "cpu/tiles.h"

namespace jvp_attn::cpu::JVP_ATTN_ISA {

// What all threads share.
template <class Value>
struct ForwardTasks {
    // Sums over a part of the keys, of the rows of a block.
    struct Part {
        Part(int64_t size, int64_t tsize) : out(size), tout(tsize) {}

        RowSums<Value> sums[kRows];
        Scratch<Value> out, tout;  // (rows, head_dim_v)
    };

    explicit ForwardTasks(const AttentionParams& params)
        : p(params), blocks(row_blocks(p)), splits(count_splits()) {
        if (splits == 1) return;
        const int size = kRows * packed_width<Value>(p.head_dim_v);
        for (int64_t i = 0; i < count(); ++i) parts.emplace_back(size, p.tout.data ? size : 0);
        unfinished = std::vector<std::atomic<int>>(blocks.size());
        for (auto& n : unfinished) n = splits;
    }

    int64_t count() const { return static_cast<int64_t>(blocks.size()) * splits; }

    const AttentionParams& p;
    const std::vector<RowBlock> blocks;
    const int splits;                          // of the keys of each block
    std::vector<Part> parts;                   // (blocks, splits), or none where splits is 1
    std::vector<std::atomic<int>> unfinished;  // splits of a block

private:
    // It does not depend on the number of threads, so that results do not.
    int count_splits() const {
        constexpr int64_t kBlocksForAllThreads = 32, kKeysOfSplit = 8 * kKeys;
        int64_t most = 1;
        for (int i = 0; i < p.batch; ++i) most = std::max(most, Sequence(p, i).keys / kKeysOfSplit);
        const auto n = std::max<int64_t>(blocks.size(), 1);
        return static_cast<int>(std::clamp<int64_t>(kBlocksForAllThreads / n, 1, most));
    }
};

template <class Value>
class Forward {
public:
    using Tasks = ForwardTasks<Value>;

    explicit Forward(Tasks& tasks)
        : tasks_(tasks),
          p_(tasks.p),
          width_(packed_width<Value>(p_.head_dim)),
          width_v_(packed_width<Value>(p_.head_dim_v)),
          queries_(kRows * width_),
          tqueries_(kRows * width_),
          keys_(kKeys * p_.head_dim),
          values_(kKeys * width_v_),
          tvalues_(kKeys * width_v_),
          scores_(kRows * kKeys),
          tscores_(kRows * kKeys),
          out_(kRows * width_v_),
          tout_(kRows * width_v_) {}

    void run(int64_t piece) {
        const int64_t block = piece / tasks_.splits;
        const RowBlock& rows = tasks_.blocks[block];
        head_ = rows.head, first_ = rows.first, rows_ = rows.rows;
        const Sequence sequence(p_, rows.batch);
        const int keys = sequence.visible_keys(first_ + rows_ - 1);
        const int length = tiles_of(tiles_of(keys, kKeys), tasks_.splits) * kKeys;
        const int start_key = piece % tasks_.splits * length;
        const int end_key = std::min(start_key + length, keys);

        start(sequence);
        for (int key = start_key; key < end_key; key += kKeys)
            add_keys(sequence, key, std::min(kKeys, end_key - key));
        if (tasks_.splits == 1 || join_parts(block, piece)) finish(sequence);
    }

private:
    using Part = typename Tasks::Part;

    // Whether all parts of the block are finished, and joined in this.
    bool join_parts(int64_t block, int64_t piece) {
        Part& own = tasks_.parts[piece];
        std::copy_n(sums_, rows_, own.sums);
        std::copy_n(out_.begin(), rows_ * width_v_, own.out.begin());
        if (p_.tout.data) std::copy_n(tout_.begin(), rows_ * width_v_, own.tout.begin());
        if (--tasks_.unfinished[block] > 0) return false;

        clear();
        for (int i = 0; i < tasks_.splits; ++i) join(tasks_.parts[block * tasks_.splits + i]);
        return true;
    }

    void join(Part& part) {
        for (int i = 0; i < rows_; ++i) {
            const auto [own, other, shift] = sums_[i].join(part.sums[i]);
            for (int j = i * width_v_; j < i * width_v_ + p_.head_dim_v; ++j) {
                out_[j] = own * out_[j] + other * part.out[j];
                if (p_.tout.data)
                    tout_[j] = own * tout_[j] + other * (part.tout[j] + shift * part.out[j]);
            }
        }
    }

    void clear() {
        std::fill_n(out_.begin(), rows_ * width_v_, Value(0));
        if (p_.tout.data) std::fill_n(tout_.begin(), rows_ * width_v_, Value(0));
        std::fill_n(sums_, rows_, RowSums<Value>());
    }

    void start(const Sequence& sequence) {
        const auto factor = static_cast<Value>(p_.softmax_scale);
        pack<Value>(sequence.queries_of(p_.q, p_.element, head_), first_, rows_, p_.head_dim,
                    factor, queries_);
        if (p_.tq.data)
            pack<Value>(sequence.queries_of(p_.tq, p_.element, head_), first_, rows_, p_.head_dim,
                        factor, tqueries_);
        clear();
    }

    void add_keys(const Sequence& sequence, int first_key, int keys) {
        const int head_k = head_ / (p_.heads / p_.heads_k);
        const bool has_score_tangent = p_.tq.data || p_.tk.data || p_.tmask.data;
        const int padded = round_up_to_panel<Value>(keys);

        pack_transposed<Value>(sequence.keys_of(p_.k, p_.element, head_k), first_key, keys,
                               p_.head_dim, keys_);
        add_scores<Store::set>(queries_, padded, scores_);
        if (p_.tq.data)
            add_scores<Store::set>(tqueries_, padded, tscores_);
        else if (has_score_tangent)
            std::fill_n(tscores_.begin(), rows_ * kKeys, Value(0));
        if (p_.tk.data) {
            pack_transposed<Value>(sequence.keys_of(p_.tk, p_.element, head_k), first_key, keys,
                                   p_.head_dim, keys_);
            add_scores<Store::add>(queries_, padded, tscores_);
        }
        const MaskOfHead<Value> mask(p_.mask, sequence.batch, head_);
        const MaskOfHead<Value> tmask(p_.tmask, sequence.batch, head_);
        for (int i = 0; i < rows_; ++i) {
            Value* const tscores = tscores_ + i * kKeys;
            hide(scores_ + i * kKeys, sequence, mask, first_ + i, first_key, keys);
            if (tmask) tmask.add_to(tscores, first_ + i, first_key, keys);
            if (has_score_tangent) hide_tangents(tscores, scores_ + i * kKeys, padded);
        }

        bool hurt[kKeys];
        pack<Value>(sequence.keys_of(p_.v, p_.element, head_k), first_key, keys, p_.head_dim_v, 1,
                    values_);
        if (take_out_non_finite<Value>(values_, keys, p_.head_dim_v, hurt)) {
            poison_rows(hurt, keys, &RowSums<Value>::poison);
            poison_rows(hurt, keys, &RowSums<Value>::tpoison);
        }
        if (p_.tv.data) {
            pack<Value>(sequence.keys_of(p_.tv, p_.element, head_k), first_key, keys, p_.head_dim_v,
                        1, tvalues_);
            if (take_out_non_finite<Value>(tvalues_, keys, p_.head_dim_v, hurt))
                poison_rows(hurt, keys, &RowSums<Value>::tpoison);
        }

        for (int i = 0; i < rows_; ++i) {
            Value *const scores = scores_ + i * kKeys, *const tscores = tscores_ + i * kKeys;
            const Value factor = sums_[i].raise(largest(scores, padded));
            if (factor != 1) {
                scale(out_ + i * width_v_, width_v_, factor);
                if (p_.tout.data) scale(tout_ + i * width_v_, width_v_, factor);
            }
            if (has_score_tangent)
                sums_[i].add(scores, tscores, padded);
            else
                sums_[i].add(scores, padded);
        }
        add_values(scores_, values_, keys, out_);
        if (has_score_tangent) add_values(tscores_, values_, keys, tout_);
        if (p_.tv.data) add_values(scores_, tvalues_, keys, tout_);
    }

    template <Store Mode>
    void add_scores(Value* left, int columns, Value* to) {
        multiply<Mode, Value>(rows_, columns, p_.head_dim, {left, width_, 1},
                              {keys_, kPanel<Value>, p_.head_dim * kPanel<Value>}, to, kKeys);
    }

    void add_values(Value* weights, Value* values, int keys, Value* to) {
        multiply<Store::add, Value>(rows_, p_.head_dim_v, keys, {weights, kKeys, 1},
                                    {values, width_v_, kPanel<Value>}, to, width_v_);
    }

    // Mark the rows that see a key of those.
    void poison_rows(const bool* hurt, int keys, Value RowSums<Value>::* poison) {
        for (int i = 0; i < rows_; ++i)
            for (int j = 0; j < keys; ++j)
                if (hurt[j] && scores_[i * kKeys + j] != -kInfinity<Value>)
                    sums_[i].*poison = std::numeric_limits<Value>::quiet_NaN();
    }

    void finish(const Sequence& sequence) {
        const Matrix out = sequence.queries_of(p_.out, p_.element, head_);
        const Matrix tout = sequence.queries_of(p_.tout, p_.element, head_);
        const Matrix residual = sequence.queries_of(p_.out_residual, p_.element, head_);
        const Matrix tresidual = sequence.queries_of(p_.tout_residual, p_.element, head_);
        Value* const lse = sequence.template rows_of<Value>(p_.lse, head_);
        Value* const lse_residual = sequence.template rows_of<Value>(p_.lse_residual, head_);
        Value* const mu = sequence.template rows_of<Value>(p_.mu, head_);
        for (int i = 0; i < rows_; ++i) {
            const RowSums<Value>& sums = sums_[i];
            const int row = first_ + i;
            Value *const o = out_ + i * width_v_, *const to = tout_ + i * width_v_;
            const bool is_dead = sums.weights == 0;
            const Value factor = is_dead ? 0 : 1 / sums.weights;
            const Value mean = sums.tangents * factor;
            const double exact = sums.maximum + std::log(static_cast<double>(sums.weights));
            lse[row] = is_dead ? -kInfinity<Value> : static_cast<Value>(exact);
            if (lse_residual) lse_residual[row] = is_dead ? 0 : exact - lse[row];
            for (int j = 0; j < p_.head_dim_v; ++j) o[j] = o[j] * factor + sums.poison;
            if (tout) {
                mu[row] = sums.centre + mean;
                for (int j = 0; j < p_.head_dim_v; ++j)
                    to[j] = to[j] * factor - mean * o[j] + sums.tpoison;
                write_row(tout, tresidual, row, p_.head_dim_v, to);
            }
            write_row(out, residual, row, p_.head_dim_v, o);
        }
    }

    Tasks& tasks_;
    const AttentionParams& p_;
    const int width_, width_v_;
    Scratch<Value> queries_, tqueries_;  // (rows, head_dim), scaled
    Scratch<Value> keys_;                // packed, of the primal, then of the tangent
    Scratch<Value> values_, tvalues_;    // packed
    Scratch<Value> scores_, tscores_;    // (rows, keys): S and T, then P and P (T - centre)
    Scratch<Value> out_, tout_;          // (rows, head_dim_v), in units of exp(maximum)
    RowSums<Value> sums_[kRows];
    int head_ = 0, first_ = 0, rows_ = 0;
};

}  // namespace jvp_attn::cpu::JVP_ATTN_ISA
