// One problem in one element type: runs the kernels and compares them with the naive formulas.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "naive.h"
#include "tensors.h"

struct Features {
    Causal causal = Causal::no;
    bool packed = false;
    bool masked = false;              // with a mask and its tangent
    bool only_tq = false;             // no tk and tv
    std::vector<int> seqused_k = {};  // of each sequence; all keys, if empty
};

struct Problem {
    const char* name;
    std::vector<int> queries, keys;  // of each sequence; equal for all, unless they are packed
    int heads, heads_k, head_dim, head_dim_v;
    Features features = {};
};

inline int failures = 0;

// Counts a failure if the error relative to the norm exceeds the tolerance.
inline void compare(const std::string& what, const naive::Matrix& actual,
                    const naive::Matrix& expected, double tolerance) {
    double error = 0, size = 0;
    for (size_t i = 0; i < expected.data.size(); ++i) {
        const double x = actual.data[i], y = expected.data[i];
        if (x == y) continue;  // also for -inf
        error += (x - y) * (x - y);
        size += y * y;
    }
    error = std::sqrt(error) / std::max(std::sqrt(size), 0.01);
    if (error <= tolerance) return;
    ++failures;
    std::printf("%s has a relative error of %.2g\n", what.c_str(), error);
}

template <class Value>
class KernelTest {
    using Sum = std::conditional_t<std::is_same_v<Value, double>, double, float>;
    using R = Rows<Value>;
    using V = Vectors<Sum>;

public:
    explicit KernelTest(const Problem& problem)
        : problem_(problem),
          mask_(batch() * problem.heads * mask_size()),
          tmask_(mask_.size()),
          grad_mask_(mask_.size()),
          grad_tmask_(mask_.size()) {
        for (R* x : {&q, &k, &v, &tq, &tk, &tv, &grad_out, &grad_tout}) x->fill(random_);
        for (V* x : {&grad_lse, &grad_mu}) x->fill(random_);
        std::normal_distribution<double> normal;
        for (Sum& x : mask_) x = normal(random_) < -.5 ? -kInfinity : normal(random_);
        for (Sum& x : tmask_) x = normal(random_);
        // A fully masked row.
        if (problem.features.masked) std::fill_n(mask_.begin(), problem.keys[0], -kInfinity);
        for (size_t i = 0; i < batch(); ++i) {
            cu_seqlens_q_.push_back(cu_seqlens_q_.back() + problem.queries[i]);
            cu_seqlens_k_.push_back(cu_seqlens_k_.back() + problem.keys[i]);
        }
        // Padding is NaN: it must have no effect.
        for (R* x : {&k, &v, &tk, &tv}) x->fill_nan(problem.features.seqused_k, problem.keys);
        if (problem.features.masked)
            for (size_t i = 0; i < mask_.size(); ++i)
                if (column(i) >= used_keys(i / (problem.heads * mask_size())))
                    mask_[i] = tmask_[i] = kNaN;
    }

    // The forward JVP, then the backward.
    void run(const Kernels& kernels, int threads) {
        const AttentionParams p = params(threads);
        kernels.forward(p);
        kernels.backward(p);
    }

    // Compares with the naive formulas.
    void check(const std::string& what, double tolerance) {
        for (size_t sequence = 0; sequence < batch(); ++sequence)
            for (int head_k = 0; head_k < problem_.heads_k; ++head_k)
                check(what, sequence, head_k, tolerance);
    }

    // Whether all results have the same bits.
    bool equals(const KernelTest& other) const {
        const auto same = [](const auto& a, const auto& b) {
            return a.size() == b.size() &&
                   (a.empty() || !std::memcmp(a.data(), b.data(), a.size() * sizeof(a[0])));
        };
        bool all = same(grad_mask_, other.grad_mask_) && same(grad_tmask_, other.grad_tmask_);
        for (const auto x : {&KernelTest::out, &KernelTest::tout, &KernelTest::grad_q,
                             &KernelTest::grad_k, &KernelTest::grad_v, &KernelTest::grad_tq,
                             &KernelTest::grad_tk, &KernelTest::grad_tv})
            all &= same((this->*x).data(), (other.*x).data());
        for (const auto x : {&KernelTest::lse, &KernelTest::mu})
            all &= same((this->*x).data(), (other.*x).data());
        return all;
    }

private:
    size_t batch() const { return problem_.queries.size(); }
    int64_t mask_size() const {
        return problem_.features.masked ? int64_t{problem_.queries[0]} * problem_.keys[0] : 0;
    }

    int used_keys(int sequence) const {
        return problem_.features.seqused_k.empty() ? problem_.keys[sequence]
                                                   : problem_.features.seqused_k[sequence];
    }
    int column(size_t i) const { return i % problem_.keys[0]; }

    // Rows of K or V with zeros instead of padding.
    naive::Matrix without_padding(naive::Matrix x, int sequence) const {
        std::fill(x.data.begin() + int64_t{used_keys(sequence)} * x.columns, x.data.end(), 0);
        return x;
    }

    R queries(int columns) {
        return R(problem_.queries, problem_.heads, columns, problem_.features.packed);
    }
    R keys(int columns) {
        return R(problem_.keys, problem_.heads_k, columns, problem_.features.packed);
    }
    V rows() { return V(problem_.queries, problem_.heads, problem_.features.packed); }

    AttentionParams params(int threads) {
        AttentionParams p;
        p.q = q.tensor(), p.k = k.tensor(), p.v = v.tensor(), p.tq = tq.tensor();
        p.out = out.tensor(), p.tout = tout.tensor();
        p.lse = lse.vector(), p.mu = mu.vector();
        if constexpr (sizeof(Value) == 2) {
            p.out_lo = out_lo.tensor(), p.tout_lo = tout_lo.tensor();
        } else if constexpr (sizeof(Value) == 4) {
            p.lse_lo = lse_lo.vector();
        }
        p.grad_out = grad_out.tensor(), p.grad_tout = grad_tout.tensor();
        p.grad_lse = grad_lse.vector(), p.grad_mu = grad_mu.vector();
        p.grad_q = grad_q.tensor(), p.grad_k = grad_k.tensor(), p.grad_v = grad_v.tensor();
        p.grad_tq = grad_tq.tensor();
        if (!problem_.features.only_tq) {
            p.tk = tk.tensor(), p.tv = tv.tensor();
            p.grad_tk = grad_tk.tensor(), p.grad_tv = grad_tv.tensor();
        }
        if (problem_.features.masked) {
            p.mask = mask_of(mask_), p.tmask = mask_of(tmask_);
            p.grad_mask = mask_of(grad_mask_), p.grad_tmask = mask_of(grad_tmask_);
        }
        if (problem_.features.packed)
            p.cu_seqlens_q = cu_seqlens_q_.data(), p.cu_seqlens_k = cu_seqlens_k_.data();
        if (!problem_.features.seqused_k.empty()) p.seqused_k = problem_.features.seqused_k.data();
        p.batch = static_cast<int>(batch());
        p.heads = problem_.heads, p.heads_k = problem_.heads_k;
        p.seqlen_q = problem_.queries[0], p.seqlen_k = problem_.keys[0];
        p.head_dim = problem_.head_dim, p.head_dim_v = problem_.head_dim_v;
        p.softmax_scale = .3;
        p.causal = problem_.features.causal;
        p.element = kElement<Value>;
        p.threads = threads;
        return p;
    }

    Mask mask_of(std::vector<Sum>& x) {
        const int64_t head = mask_size();
        return {x.data(), head * problem_.heads, head, problem_.keys[0], 1, kElement<Sum>};
    }

    naive::Matrix mask_matrix(const std::vector<Sum>& x, int sequence, int head) {
        naive::Matrix result(problem_.queries[sequence], problem_.keys[sequence]);
        if (problem_.features.masked)
            for (size_t i = 0; i < result.data.size(); ++i)
                result.data[i] = x[(sequence * problem_.heads + head) * mask_size() + i];
        return result;
    }

    naive::Head naive_head(int sequence, int head) {
        const int group = problem_.heads / problem_.heads_k;
        const int n = problem_.queries[sequence], m = problem_.keys[sequence];
        naive::Head x;
        x.scale = .3;
        x.q = q.matrix(sequence, head, n), x.tq = tq.matrix(sequence, head, n);
        const auto of_keys = [&](R& rows) {
            return without_padding(rows.matrix(sequence, head / group, m), sequence);
        };
        x.k = of_keys(k), x.v = of_keys(v);
        x.tk = naive::Matrix(m, problem_.head_dim), x.tv = naive::Matrix(m, problem_.head_dim_v);
        if (!problem_.features.only_tq) x.tk = of_keys(tk), x.tv = of_keys(tv);
        x.mask = mask_matrix(mask_, sequence, head), x.tmask = mask_matrix(tmask_, sequence, head);
        const int used = used_keys(sequence);
        const int diagonal = problem_.features.causal == Causal::bottom_right ? used - n : 0;
        for (int i = 0; i < n; ++i)
            for (int j = 0; j < m; ++j) {
                if (j >= used) x.tmask(i, j) = 0;
                if (j >= used || (problem_.features.causal != Causal::no && j > i + diagonal))
                    x.mask(i, j) = -kInfinity;
            }
        x.grad_out = grad_out.matrix(sequence, head, n);
        x.grad_tout = grad_tout.matrix(sequence, head, n);
        x.grad_lse = grad_lse.matrix(sequence, head, n);
        x.grad_mu = grad_mu.matrix(sequence, head, n);
        x.compute();
        return x;
    }

    void check(const std::string& what, int sequence, int head_k, double tolerance) {
        const int group = problem_.heads / problem_.heads_k;
        const int n = problem_.queries[sequence], m = problem_.keys[sequence];
        const auto check_close = [&](const char* name, const naive::Matrix& actual,
                                     const naive::Matrix& expected) {
            compare(what + ": " + name, actual, expected, tolerance);
        };
        naive::Matrix gk(m, problem_.head_dim), gtk = gk, gv(m, problem_.head_dim_v), gtv = gv;
        for (int head = head_k * group; head < (head_k + 1) * group; ++head) {
            const naive::Head x = naive_head(sequence, head);
            check_close("out", out.matrix(sequence, head, n), x.out);
            check_close("lse", lse.matrix(sequence, head, n), x.lse);
            check_close("tout", tout.matrix(sequence, head, n), x.tout);
            check_close("mu", mu.matrix(sequence, head, n), x.mu);
            check_close("grad_q", grad_q.matrix(sequence, head, n), x.grad_q);
            check_close("grad_tq", grad_tq.matrix(sequence, head, n), x.grad_tq);
            if (problem_.features.masked) {
                check_close("grad_mask", mask_matrix(grad_mask_, sequence, head), x.grad_mask);
                check_close("grad_tmask", mask_matrix(grad_tmask_, sequence, head), x.grad_tmask);
            }
            gk = gk + x.grad_k, gv = gv + x.grad_v, gtk = gtk + x.grad_tk, gtv = gtv + x.grad_tv;
        }
        check_close("grad_k", grad_k.matrix(sequence, head_k, m), gk);
        check_close("grad_v", grad_v.matrix(sequence, head_k, m), gv);
        if (problem_.features.only_tq) return;
        check_close("grad_tk", grad_tk.matrix(sequence, head_k, m), gtk);
        check_close("grad_tv", grad_tv.matrix(sequence, head_k, m), gtv);
    }

    const Problem& problem_;
    std::mt19937 random_{1};
    R q = queries(problem_.head_dim), tq = q, grad_q = q, grad_tq = q;
    R k = keys(problem_.head_dim), tk = k, grad_k = k, grad_tk = k;
    R v = keys(problem_.head_dim_v), tv = v, grad_v = v, grad_tv = v;
    R out = queries(problem_.head_dim_v), tout = out, out_lo = out, tout_lo = out;
    R grad_out = out, grad_tout = out;
    V lse = rows(), mu = lse, lse_lo = lse, grad_lse = lse, grad_mu = lse;
    std::vector<Sum> mask_, tmask_, grad_mask_, grad_tmask_;
    std::vector<int32_t> cu_seqlens_q_{0}, cu_seqlens_k_{0};
};
