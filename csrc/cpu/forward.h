// O = P V and lse; with tangents also tO = (P (T - mu)) V + P tV and mu, in the same pass over the
// keys. A thread takes some rows of one head at a time, and they meet the keys tile by tile:
// FlashAttention (arXiv 2205.14135) with tangents. Keys and values are packed once for all of these
// rows, for rows of a head lie apart in memory, and to collect them takes long. Where there are few
// rows and many keys, a thread takes a part of the keys, and who finishes the last part joins them
// all, in their order.
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

    ForwardTasks(const AttentionParams& params, int threads)
        : p(params),
          splits(count_splits()),
          tiles(splits > 1 ? 1 : count_tiles(threads)),
          blocks(row_blocks(p, tiles * kRows)) {
        if (splits == 1) return;
        const int size = kRows * packed_width<Value>(p.head_dim_v);
        for (int64_t i = 0; i < count(); ++i) parts.emplace_back(size, p.tout.data ? size : 0);
        unfinished = std::vector<std::atomic<int>>(blocks.size());
        for (auto& n : unfinished) n = splits;
    }

    int64_t count() const { return static_cast<int64_t>(blocks.size()) * splits; }

    const AttentionParams& p;
    const int splits;  // of the keys of each block
    const int tiles;   // of a block
    const std::vector<RowBlock> blocks;
    std::vector<Part> parts;                   // (blocks, splits), or none where splits is 1
    std::vector<std::atomic<int>> unfinished;  // splits of a block

private:
    int64_t row_tiles() const {
        int64_t n = 0;
        for (int i = 0; i < p.batch; ++i) n += p.heads * tiles_of(Sequence(p, i).queries, kRows);
        return n;
    }

    // It does not depend on the number of threads, so that results do not.
    int count_splits() const {
        constexpr int64_t kTilesForAllThreads = 32, kKeysOfSplit = 8 * kKeys;
        int64_t most = 1;
        for (int i = 0; i < p.batch; ++i) most = std::max(most, Sequence(p, i).keys / kKeysOfSplit);
        const int64_t all = std::max<int64_t>(row_tiles(), 1);
        return static_cast<int>(std::clamp<int64_t>(kTilesForAllThreads / all, 1, most));
    }

    // As many as leave each thread some blocks, so that all end at about one time. Results do not
    // depend on it.
    int count_tiles(int threads) const {
        constexpr int64_t kMostTiles = 4, kBlocksOfThread = 4;
        return static_cast<int>(
            std::clamp<int64_t>(row_tiles() / (kBlocksOfThread * threads), 1, kMostTiles));
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
          has_score_tangent_(p_.tq.data || p_.tk.data || p_.tmask.data),
          queries_(tasks.tiles * kRows * width_),
          tqueries_(tasks.tiles * kRows * width_),
          keys_(kKeys * p_.head_dim),
          tkeys_(kKeys * p_.head_dim),
          values_(kKeys * width_v_),
          tvalues_(kKeys * width_v_),
          scores_(kRows * kKeys),
          tscores_(kRows * kKeys),
          out_(tasks.tiles * kRows * width_v_),
          tout_(tasks.tiles * kRows * width_v_),
          sums_(tasks.tiles * kRows) {}

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
        std::copy_n(sums_.begin(), rows_, own.sums);
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
        std::fill_n(sums_.begin(), rows_, RowSums<Value>());
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
        const auto of_keys = [&](const Tensor& x) {
            return sequence.keys_of(x, p_.element, head_k);
        };
        pack_transposed<Value>(of_keys(p_.k), first_key, keys, p_.head_dim, keys_);
        if (p_.tk.data)
            pack_transposed<Value>(of_keys(p_.tk), first_key, keys, p_.head_dim, tkeys_);
        pack<Value>(of_keys(p_.v), first_key, keys, p_.head_dim_v, 1, values_);
        if (p_.tv.data) pack<Value>(of_keys(p_.tv), first_key, keys, p_.head_dim_v, 1, tvalues_);
        bool hurt[kKeys], thurt[kKeys];
        const bool any_hurt = take_out_non_finite<Value>(values_, keys, p_.head_dim_v, hurt);
        const bool any_thurt =
            p_.tv.data && take_out_non_finite<Value>(tvalues_, keys, p_.head_dim_v, thurt);

        for (int row = 0; row < rows_; row += kRows) {
            const int rows = std::min(kRows, rows_ - row);
            const int visible = sequence.visible_keys(first_ + row + rows - 1) - first_key;
            if (visible <= 0) continue;
            const int seen = std::min(keys, visible);
            score(sequence, row, rows, first_key, seen);
            if (any_hurt) poison_rows(hurt, row, rows, seen, &RowSums<Value>::poison);
            if (any_hurt) poison_rows(hurt, row, rows, seen, &RowSums<Value>::tpoison);
            if (any_thurt) poison_rows(thurt, row, rows, seen, &RowSums<Value>::tpoison);
            add_values(row, rows, seen);
        }
    }

    // S and T of a tile.
    void score(const Sequence& sequence, int row, int rows, int first_key, int keys) {
        const int padded = round_up_to_panel<Value>(keys);
        add_scores<Store::set>(rows, padded, queries_ + row * width_, keys_, scores_);
        if (p_.tq.data)
            add_scores<Store::set>(rows, padded, tqueries_ + row * width_, keys_, tscores_);
        else if (has_score_tangent_)
            std::fill_n(tscores_.begin(), rows * kKeys, Value(0));
        if (p_.tk.data)
            add_scores<Store::add>(rows, padded, queries_ + row * width_, tkeys_, tscores_);

        const MaskOfHead<Value> mask(p_.mask, sequence.batch, head_);
        const MaskOfHead<Value> tmask(p_.tmask, sequence.batch, head_);
        for (int i = 0; i < rows; ++i) {
            Value *const scores = scores_ + i * kKeys, *const tscores = tscores_ + i * kKeys;
            hide(scores, sequence, mask, first_ + row + i, first_key, keys);
            if (tmask) tmask.add_to(tscores, first_ + row + i, first_key, keys);
            if (has_score_tangent_) hide_tangents(tscores, scores, padded);
        }
    }

    // S and T become P and P (T - centre), and their products with V and tV are added.
    void add_values(int row, int rows, int keys) {
        const int padded = round_up_to_panel<Value>(keys);
        Value *const out = out_ + row * width_v_, *const tout = tout_ + row * width_v_;
        for (int i = 0; i < rows; ++i) {
            Value *const scores = scores_ + i * kKeys, *const tscores = tscores_ + i * kKeys;
            RowSums<Value>& sums = sums_[row + i];
            const Value factor = sums.raise(largest(scores, padded));
            if (factor != 1) {
                scale(out + i * width_v_, width_v_, factor);
                if (p_.tout.data) scale(tout + i * width_v_, width_v_, factor);
            }
            if (has_score_tangent_)
                sums.add(scores, tscores, padded);
            else
                sums.add(scores, padded);
        }
        add_weighted(scores_, rows, keys, values_, out);
        if (has_score_tangent_) add_weighted(tscores_, rows, keys, values_, tout);
        if (p_.tv.data) add_weighted(scores_, rows, keys, tvalues_, tout);
    }

    template <Store Mode>
    void add_scores(int rows, int columns, Value* left, Value* right, Value* to) {
        multiply<Mode, Value>(rows, columns, p_.head_dim, {left, width_, 1},
                              {right, kPanel<Value>, p_.head_dim * kPanel<Value>}, to, kKeys);
    }

    void add_weighted(Value* weights, int rows, int keys, Value* values, Value* to) {
        multiply<Store::add, Value>(rows, p_.head_dim_v, keys, {weights, kKeys, 1},
                                    {values, width_v_, kPanel<Value>}, to, width_v_);
    }

    // Mark the rows that see a key of those.
    void poison_rows(const bool* hurt, int row, int rows, int keys,
                     Value RowSums<Value>::* poison) {
        for (int i = 0; i < rows; ++i)
            for (int j = 0; j < keys; ++j)
                if (hurt[j] && scores_[i * kKeys + j] != -kInfinity<Value>)
                    sums_[row + i].*poison = std::numeric_limits<Value>::quiet_NaN();
    }

    void finish(const Sequence& sequence) {
        const Matrix out = sequence.queries_of(p_.out, p_.element, head_);
        const Matrix tout = sequence.queries_of(p_.tout, p_.element, head_);
        const Matrix residual = sequence.queries_of(p_.out_lo, p_.element, head_);
        const Matrix tresidual = sequence.queries_of(p_.tout_lo, p_.element, head_);
        Value* const lse = sequence.template rows_of<Value>(p_.lse, head_);
        Value* const lse_lo = sequence.template rows_of<Value>(p_.lse_lo, head_);
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
            if (lse_lo) lse_lo[row] = is_dead ? 0 : exact - lse[row];
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
    const bool has_score_tangent_;
    Scratch<Value> queries_, tqueries_;  // (rows of the block, head_dim), scaled
    Scratch<Value> keys_, tkeys_;        // packed
    Scratch<Value> values_, tvalues_;    // packed
    Scratch<Value> scores_, tscores_;    // (rows, keys): S and T, then P and P (T - centre)
    Scratch<Value> out_, tout_;         // (rows of the block, head_dim_v), in units of exp(maximum)
    std::vector<RowSums<Value>> sums_;  // (rows of the block)
    int head_ = 0, first_ = 0, rows_ = 0;
};

}  // namespace jvp_attn::cpu::JVP_ATTN_ISA
