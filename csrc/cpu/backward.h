// The backward of attention and of its tangent, in the centred form: with dO, dtO the cotangents of
// O, tO and Tc = T - mu,
//
//     A = dO Vᵀ + dtO tVᵀ    Bc = dtO Vᵀ - beta    beta = dtO·O - g_mu    delta = dO·O + dtO·tO -
//     g_lse dT = P Bc           dS = P (A + Bc Tc - delta) dq = s (dS K + dT tK)    dk = s (dSᵀ Q +
//     dTᵀ tQ)    dv = Pᵀ dO + (P Tc)ᵀ dtO dtq = s dT K               dtk = s dTᵀ Q dtv = Pᵀ dtO
//
// Rows of dS and dT sum to g_lse and g_mu, but only as exactly as delta and beta are known: by
// as much as O was rounded, e and f, they are too large, and that multiplies what all keys have in
// common into dq and dtq. Each row corrects it at its heaviest key k: dq -= s (e k + f tk), dtq -=
// s f k.
//
// A thread takes some keys of one head at a time, and they meet the queries of all heads that share
// them, tile by tile: gradients of keys stay in the cache, those of queries are summed in memory.
#pragma once

#include "cpu/scratch.h"
#include "cpu/shared.h"
#include "cpu/softmax.h"

namespace jvp_attn::cpu::JVP_ATTN_ISA {

template <class Value>
class Backward {
public:
    struct Tasks {
        explicit Tasks(Shared<Value>& x) : shared(x), blocks(key_blocks(x.p)) {}

        int64_t count() const { return blocks.size(); }

        Shared<Value>& shared;
        const std::vector<KeyBlock> blocks;
    };

    explicit Backward(Tasks& tasks)
        : tasks_(tasks),
          shared_(tasks.shared),
          p_(tasks.shared.p),
          width_(packed_width<Value>(p_.head_dim)),
          width_v_(packed_width<Value>(p_.head_dim_v)),
          has_t_(p_.tq.data || p_.tk.data || p_.tmask.data),
          has_b_(p_.grad_tout.data || p_.grad_mu.data),
          keys_transposed_(kBackwardKeys * p_.head_dim),
          tkeys_transposed_(kBackwardKeys * p_.head_dim),
          values_transposed_(kBackwardKeys * p_.head_dim_v),
          tvalues_transposed_(kBackwardKeys * p_.head_dim_v),
          keys_(kBackwardKeys * width_),
          tkeys_(kBackwardKeys * width_),
          gk_(kBackwardKeys * width_),
          gtk_(kBackwardKeys * width_),
          gv_(kBackwardKeys * width_v_),
          gtv_(kBackwardKeys * width_v_),
          queries_(kBackwardRows * width_),
          tqueries_(kBackwardRows * width_),
          g_out_(kBackwardRows * width_v_),
          g_tout_(kBackwardRows * width_v_),
          s_(kBackwardRows * kScoreStride),
          t_(kBackwardRows * kScoreStride),
          a_(kBackwardRows * kScoreStride),
          b_(kBackwardRows * kScoreStride),
          gq_(kBackwardRows * width_),
          gtq_(kBackwardRows * width_) {}

    void run(int64_t piece) {
        const KeyBlock& block = tasks_.blocks[piece];
        add_keys(Sequence(p_, block.batch), block.head, block.first, block.keys);
    }

private:
    // Rows of scores lie a panel apart too: transposed, they are read across.
    static constexpr int kScoreStride = kBackwardKeys + kPanel<Value>;

    int group() const { return p_.heads / p_.heads_k; }

    Matrix queries_of(const Sequence& sequence, const Tensor& x, int head) const {
        return sequence.queries_of(x, p_.element, head);
    }

    // ------------------------------------------------------------------------------------------
    // One tile of keys, against all queries

    void add_keys(const Sequence& sequence, int head_k, int first_key, int keys) {
        const auto of_keys = [&](const Tensor& x) {
            return sequence.keys_of(x, p_.element, head_k);
        };
        pack_transposed<Value>(of_keys(p_.k), first_key, keys, p_.head_dim, keys_transposed_);
        pack_transposed<Value>(of_keys(p_.v), first_key, keys, p_.head_dim_v, values_transposed_);
        pack_finite(of_keys(p_.k), first_key, keys, keys_);
        if (p_.tk.data) {
            pack_transposed<Value>(of_keys(p_.tk), first_key, keys, p_.head_dim, tkeys_transposed_);
            pack_finite(of_keys(p_.tk), first_key, keys, tkeys_);
        }
        if (p_.tv.data)
            pack_transposed<Value>(of_keys(p_.tv), first_key, keys, p_.head_dim_v,
                                   tvalues_transposed_);
        for (Value* sums : {gk_.begin(), gtk_.begin()}) std::fill_n(sums, keys * width_, Value(0));
        for (Value* sums : {gv_.begin(), gtv_.begin()})
            std::fill_n(sums, keys * width_v_, Value(0));

        for (int head = head_k * group(); head < (head_k + 1) * group(); ++head)
            for (int row = 0; row < sequence.queries; row += kBackwardRows) {
                const int rows = std::min(kBackwardRows, sequence.queries - row);
                if (sequence.visible_keys(row + rows - 1) > first_key)
                    add_tile(sequence, head, row, rows, first_key, keys);
            }

        write_keys(of_keys(p_.grad_k), gk_, first_key, keys, p_.head_dim);
        write_keys(of_keys(p_.grad_tk), gtk_, first_key, keys, p_.head_dim);
        write_keys(of_keys(p_.grad_v), gv_, first_key, keys, p_.head_dim_v);
        write_keys(of_keys(p_.grad_tv), gtv_, first_key, keys, p_.head_dim_v);
    }

    void pack_finite(const Matrix& m, int first_key, int keys, Value* to) {
        bool hurt[kBackwardKeys];
        pack<Value>(m, first_key, keys, p_.head_dim, 1, to);
        take_out_non_finite<Value>(to, keys, p_.head_dim, hurt);
    }

    void write_keys(const Matrix& to, Value* sums, int first_key, int keys, int columns) {
        if (!to) return;
        for (int i = 0; i < keys; ++i)
            write_row(to, first_key + i, columns, sums + i * packed_width<Value>(columns));
    }

    // ------------------------------------------------------------------------------------------
    // One tile of scores

    void add_tile(const Sequence& sequence, int head, int row, int rows, int first_key, int keys) {
        const QueryStatistics<Value>* const of_rows = shared_.statistics_of(sequence, head) + row;
        const auto pack_queries = [&](const Tensor& x, int columns, double factor, Value* to) {
            pack(queries_of(sequence, x, head), row, rows, columns, Value(factor), to);
        };
        const int padded = round_up_to_panel<Value>(keys);

        pack_queries(p_.q, p_.head_dim, p_.softmax_scale, queries_);
        scores<Store::set>(rows, padded, p_.head_dim, queries_, keys_transposed_, s_);
        if (p_.tq.data) {
            pack_queries(p_.tq, p_.head_dim, p_.softmax_scale, tqueries_);
            scores<Store::set>(rows, padded, p_.head_dim, tqueries_, keys_transposed_, t_);
        } else if (has_t_) {
            std::fill_n(t_.begin(), rows * kScoreStride, Value(0));
        }
        if (p_.tk.data)
            scores<Store::add>(rows, padded, p_.head_dim, queries_, tkeys_transposed_, t_);

        if (p_.grad_out.data) {
            pack_queries(p_.grad_out, p_.head_dim_v, 1, g_out_);
            silence_dead(of_rows, rows, g_out_);
            scores<Store::set>(rows, padded, p_.head_dim_v, g_out_, values_transposed_, a_);
        } else {
            std::fill_n(a_.begin(), rows * kScoreStride, Value(0));
        }
        if (p_.grad_tout.data) {
            pack_queries(p_.grad_tout, p_.head_dim_v, 1, g_tout_);
            silence_dead(of_rows, rows, g_tout_);
            scores<Store::set>(rows, padded, p_.head_dim_v, g_tout_, values_transposed_, b_);
            if (p_.tv.data)
                scores<Store::add>(rows, padded, p_.head_dim_v, g_tout_, tvalues_transposed_, a_);
        } else if (has_b_) {
            std::fill_n(b_.begin(), rows * kScoreStride, Value(0));
        }

        const MaskOfHead<Value> mask(p_.mask, sequence.batch, head);
        const MaskOfHead<Value> tmask(p_.tmask, sequence.batch, head);
        const MaskOfHead<Value> grad_mask(p_.grad_mask, sequence.batch, head);
        const MaskOfHead<Value> grad_tmask(p_.grad_tmask, sequence.batch, head);
        for (int i = 0; i < rows; ++i) {
            hide(s_ + i * kScoreStride, sequence, mask, row + i, first_key, keys);
            if (tmask) tmask.add_to(t_ + i * kScoreStride, row + i, first_key, keys);
            differentiate_softmax(of_rows[i], i, padded);
            if (grad_mask) grad_mask.add_from(a_ + i * kScoreStride, row + i, first_key, keys);
            if (grad_tmask) grad_tmask.add_from(b_ + i * kScoreStride, row + i, first_key, keys);
        }
        add_to_queries(sequence, head, row, rows, first_key, keys);
        add_to_keys(rows, keys);
    }

    template <Store Mode>
    void scores(int rows, int columns, int depth, Value* left, Value* right, Value* to) {
        multiply<Mode, Value>(rows, columns, depth, {left, packed_width<Value>(depth), 1},
                              {right, kPanel<Value>, depth * kPanel<Value>}, to, kScoreStride);
    }

    // Cotangents of rows that see no key do not count, be they NaN.
    void silence_dead(const QueryStatistics<Value>* of_rows, int rows, Value* cotangents) const {
        for (int i = 0; i < rows; ++i)
            if (of_rows[i].lse == kInfinity<Value>)
                std::fill_n(cotangents + i * width_v_, width_v_, Value(0));
    }

    // S, T, A, B of a row become P, P Tc, dS, dT: 0 for hidden keys, whatever these hold.
    void differentiate_softmax(const QueryStatistics<Value>& row, int i, int columns) {
        Value *const s = s_ + i * kScoreStride, *const t = t_ + i * kScoreStride;
        Value *const a = a_ + i * kScoreStride, *const b = b_ + i * kScoreStride;
        const Vector<Value> zero = {};
        for (int j = 0; j < columns; j += kLanes<Value>) {
            const Vector<Value> score = load(s + j);
            const auto hidden = score == -kInfinity<Value>;
            const Vector<Value> p = exp_of_nonpositive<Value>((score - row.lse) - row.lse_lo);
            Vector<Value> x = load(a + j);
            if (has_b_) {
                const Vector<Value> bc = load(b + j) - row.beta;
                if (has_t_) x += bc * (load(t + j) - row.mu);
                store(b + j, hidden ? zero : p * bc);
            }
            if (has_t_) store(t + j, hidden ? zero : p * (load(t + j) - row.mu));
            store(a + j, hidden ? zero : p * (x - row.delta));
            store(s + j, hidden ? zero : p);
        }
    }

    void add_to_queries(const Sequence& sequence, int head, int row, int rows, int first_key,
                        int keys) {
        const bool has_gq = p_.grad_q.data, has_gtq = p_.grad_tq.data && has_b_;
        const auto multiply_keys = [&]<Store Mode>(Value* weights, Value* right, Value* to) {
            multiply<Mode, Value>(rows, p_.head_dim, keys, {weights, kScoreStride, 1},
                                  {right, width_, kPanel<Value>}, to, width_);
        };
        if (has_gq) {
            multiply_keys.template operator()<Store::set>(a_, keys_, gq_);
            if (has_b_ && p_.tk.data)
                multiply_keys.template operator()<Store::add>(b_, tkeys_, gq_);
        }
        if (has_gtq) multiply_keys.template operator()<Store::set>(b_, keys_, gtq_);
        if (!has_gq && !has_gtq) return;

        shared_.wait_for_turn(sequence, head, row, first_key);
        const Matrix dq = shared_.sums_of_gq(sequence, head);
        const Matrix dtq = shared_.sums_of_gtq(sequence, head);
        for (int i = 0; i < rows; ++i) {
            count(shared_.statistics_of(sequence, head)[row + i], i, first_key, keys);
            if (has_gq) add(dq, row + i, p_.softmax_scale, gq_ + i * width_);
            if (has_gtq) add(dtq, row + i, p_.softmax_scale, gtq_ + i * width_);
        }
        if (first_key + keys >= sequence.visible_keys(row + rows - 1)) {
            for (int i = row; i < row + rows; ++i)
                correct(sequence, head / group(), shared_.statistics_of(sequence, head)[i], i, dq,
                        dtq);
            shared_.round(sequence, head, row, rows);
        }
        shared_.end_turn(sequence, head, row, first_key);
    }

    void add(const Matrix& sums, int row, double factor, const Value* from) const {
        Value* const to = static_cast<Value*>(sums.data) + row * sums.row_stride;
        for (int j = 0; j < p_.head_dim; ++j) to[j] += static_cast<Value>(factor) * from[j];
    }

    // Row i of the tile is a part of the row.
    void count(QueryStatistics<Value>& row, int i, int first_key, int keys) const {
        const Value* const weights = s_ + i * kScoreStride;
        const int padded = round_up_to_panel<Value>(keys);
        row.ds += sum(a_ + i * kScoreStride, padded);
        if (has_b_) row.dt += sum(b_ + i * kScoreStride, padded);
        const Value weight = largest(weights, padded);
        if (!(weight > row.largest_weight)) return;
        row.largest_weight = weight;
        row.heaviest_key = first_key + (std::find(weights, weights + keys, weight) - weights);
    }

    // Take off what too large row sums have added to gradients of a row that is complete.
    void correct(const Sequence& sequence, int head_k, const QueryStatistics<Value>& row, int i,
                 const Matrix& dq, const Matrix& dtq) const {
        if (row.largest_weight == 0) return;
        const double e = p_.softmax_scale * (row.ds - row.g_lse);
        const double f = p_.softmax_scale * (row.dt - row.g_mu);
        Value key[256];
        read_row(sequence.keys_of(p_.k, p_.element, head_k), row.heaviest_key, p_.head_dim, key);
        if (p_.grad_q.data) add(dq, i, -e, key);
        if (!has_b_) return;
        if (p_.grad_tq.data) add(dtq, i, -f, key);
        if (!p_.grad_q.data || !p_.tk.data) return;
        read_row(sequence.keys_of(p_.tk, p_.element, head_k), row.heaviest_key, p_.head_dim, key);
        add(dq, i, -f, key);
    }

    void add_to_keys(int rows, int keys) {
        const auto from_rows = [&](Value* weights, Value* right, int columns, Value* to) {
            const int width = packed_width<Value>(columns);
            multiply<Store::add, Value>(keys, columns, rows, {weights, 1, kScoreStride},
                                        {right, width, kPanel<Value>}, to, width);
        };
        bool hurt[kBackwardRows];
        take_out_non_finite<Value>(queries_, rows, p_.head_dim, hurt);
        if (p_.tq.data) take_out_non_finite<Value>(tqueries_, rows, p_.head_dim, hurt);
        if (p_.grad_k.data) {
            from_rows(a_, queries_, p_.head_dim, gk_);
            if (has_b_ && p_.tq.data) from_rows(b_, tqueries_, p_.head_dim, gk_);
        }
        if (p_.grad_v.data) {
            if (p_.grad_out.data) from_rows(s_, g_out_, p_.head_dim_v, gv_);
            if (has_t_ && p_.grad_tout.data) from_rows(t_, g_tout_, p_.head_dim_v, gv_);
        }
        if (p_.grad_tk.data && has_b_) from_rows(b_, queries_, p_.head_dim, gtk_);
        if (p_.grad_tv.data && p_.grad_tout.data) from_rows(s_, g_tout_, p_.head_dim_v, gtv_);
    }

    Tasks& tasks_;
    Shared<Value>& shared_;
    const AttentionParams& p_;
    const int width_, width_v_;
    const bool has_t_, has_b_;  // whether T and B are not all zero
    Scratch<Value> keys_transposed_, tkeys_transposed_;
    Scratch<Value> values_transposed_, tvalues_transposed_;
    Scratch<Value> keys_, tkeys_;         // (keys, head_dim)
    Scratch<Value> gk_, gtk_, gv_, gtv_;  // (keys, head_dim or head_dim_v)
    Scratch<Value> queries_, tqueries_;   // (rows, head_dim), scaled
    Scratch<Value> g_out_, g_tout_;       // (rows, head_dim_v)
    Scratch<Value> s_, t_, a_, b_;        // (rows, keys)
    Scratch<Value> gq_, gtq_;             // (rows, head_dim), of one block of keys
};

}  // namespace jvp_attn::cpu::JVP_ATTN_ISA
