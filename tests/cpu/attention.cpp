// Every map of every instruction set that this machine has against the naive formulas: problems
// that fill tiles and that do not, in buffers without a spare element, so that sanitizers see a
// step beyond.
//
//     attention          compare everything
//     attention races    in float and in one thread and many, and compare these: a sanitizer of
//     threads
//                        is too slow for more
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>

#include "cpu/map.h"
#include "naive.h"

using namespace jvp_attn::cpu;

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

struct Problem {
    const char* name;
    std::vector<int> queries, keys;  // of each sequence; the same for all, unless they are packed
    int heads, heads_k, head_dim, head_dim_v;
    Causal causal = Causal::no;
    bool packed = false, masked = false, only_q_moves = false;
    std::vector<int> used_keys = {};  // of each sequence; all of them, if empty
};

const Problem kProblems[] = {
    {"one query, one key", {1}, {1}, 1, 1, 1, 1},
    {"no key", {3}, {0}, 2, 1, 4, 4},
    {"less than a tile", {5, 5}, {7, 7}, 4, 2, 3, 6},
    {"a tile", {96}, {128}, 1, 1, 8, 8},
    {"tiles and a rest", {200}, {300}, 2, 1, 20, 17},
    {"largest head dim", {7}, {9}, 1, 1, 256, 255},
    {"bottom right", {150}, {260}, 2, 2, 16, 8, Causal::bottom_right},
    {"rows without keys", {150}, {40}, 2, 1, 16, 8, Causal::bottom_right},
    {"top left", {130}, {260}, 2, 1, 16, 8, Causal::top_left},
    {"several tiles of queries", {500}, {310}, 2, 1, 10, 9},
    {"several tiles, causal", {500}, {420}, 2, 2, 10, 9, Causal::bottom_right},
    {"packed", {97, 0, 5, 130}, {140, 3, 0, 200}, 2, 1, 9, 5, Causal::bottom_right, true},
    {"masked", {101, 101}, {135, 135}, 2, 1, 12, 10, Causal::no, false, true},
    {"masked and causal", {101}, {135}, 2, 2, 12, 10, Causal::bottom_right, false, true},
    {"only the queries move", {100}, {130}, 2, 1, 16, 16, Causal::no, false, false, true},
    {"parts of the keys", {3}, {5000}, 2, 1, 4, 4},
    {"parts of the keys, causal", {300}, {4400}, 1, 1, 4, 4, Causal::bottom_right},
    {"padded keys",
     {101, 101, 101, 101},
     {300, 300, 300, 300},
     2,
     1,
     12,
     10,
     Causal::no,
     false,
     false,
     false,
     {300, 270, 7, 0}},
    {"padded keys, masked, causal",
     {60, 60, 60},
     {150, 150, 150},
     2,
     1,
     8,
     6,
     Causal::bottom_right,
     false,
     true,
     false,
     {129, 40, 0}},
    {"padded keys, masked, top left",
     {101, 101},
     {150, 150},
     2,
     2,
     8,
     6,
     Causal::top_left,
     false,
     true,
     false,
     {90, 128}},
    {"padded keys, packed",
     {97, 5, 30},
     {140, 8, 200},
     2,
     1,
     9,
     5,
     Causal::bottom_right,
     true,
     false,
     false,
     {99, 8, 0}},
    {"parts of the keys, padded",
     {3, 3},
     {5000, 5000},
     2,
     1,
     4,
     4,
     Causal::no,
     false,
     false,
     false,
     {4200, 1}},
};

// ------------------------------------------------------------------------------------------------
// Tensors of a problem, (sequence, head) by (sequence, head) as matrices, and as the maps take them

template <class Value>
constexpr Element kElement = std::is_same_v<Value, double>  ? Element::float64
                             : std::is_same_v<Value, float> ? Element::float32
                                                            : Element::bfloat16;

double read(double x) { return x; }
double read(float x) { return x; }
double read(uint16_t x) { return std::bit_cast<float>(uint32_t{x} << 16); }
void write(double& to, double x) { to = x; }
void write(float& to, double x) { to = static_cast<float>(x); }
void write(uint16_t& to, double x) {
    to = std::bit_cast<uint32_t>(static_cast<float>(x)) >> 16;  // truncated
}

// (batch, row, head, column), with a gap after each row but the last.
template <class Value>
class Rows {
public:
    Rows(const std::vector<int>& lengths, int heads, int columns, bool packed)
        : columns_(columns), head_stride_(columns + 1), row_stride_(heads * head_stride_) {
        int64_t rows = 0;
        for (const int length : lengths) {
            first_.push_back(rows);
            rows += length;
        }
        batch_stride_ = packed || lengths.empty() ? 0 : lengths[0] * row_stride_;
        data_.resize(std::max<int64_t>(rows * row_stride_ - 1, 0));
    }

    Tensor tensor() { return {data_.data(), batch_stride_, row_stride_, head_stride_}; }

    Value& at(int sequence, int head, int row, int column) {
        return data_[(first_[sequence] + row) * row_stride_ + head * head_stride_ + column];
    }

    naive::Matrix matrix(int sequence, int head, int rows) {
        naive::Matrix result(rows, columns_);
        for (int i = 0; i < rows; ++i)
            for (int j = 0; j < columns_; ++j) result(i, j) = read(at(sequence, head, i, j));
        return result;
    }

    void fill(std::mt19937& random) {
        std::normal_distribution<double> normal;
        for (Value& x : data_) write(x, normal(random));
    }

    // NaN in the rows of each sequence from `begin` on.
    void poison(const std::vector<int>& begin, const std::vector<int>& end, int heads) {
        for (size_t i = 0; i < begin.size(); ++i)
            for (int row = begin[i]; row < end[i]; ++row)
                for (int head = 0; head < heads; ++head)
                    for (int j = 0; j < columns_; ++j) write(at(i, head, row, j), kNaN);
    }

    const std::vector<Value>& data() const { return data_; }

private:
    int columns_;
    int64_t head_stride_, row_stride_, batch_stride_;
    std::vector<int64_t> first_;
    std::vector<Value> data_;
};

// (batch, head, row), contiguous rows.
template <class Value>
class Vectors {
public:
    Vectors(const std::vector<int>& lengths, int heads, bool packed) {
        for (const int length : lengths) {
            first_.push_back(packed ? rows_ : 0);
            rows_ = packed ? rows_ + length : length;
        }
        batch_stride_ = packed ? 0 : heads * rows_;
        data_.resize(heads * rows_ * (packed ? 1 : lengths.size()));
    }

    RowVector vector() { return {data_.data(), batch_stride_, rows_}; }

    naive::Matrix matrix(int sequence, int head, int rows) {
        naive::Matrix result(rows, 1);
        for (int i = 0; i < rows; ++i)
            result(i, 0) = data_[sequence * batch_stride_ + head * rows_ + first_[sequence] + i];
        return result;
    }

    void fill(std::mt19937& random) {
        std::normal_distribution<double> normal;
        for (Value& x : data_) x = normal(random);
    }

    const std::vector<Value>& data() const { return data_; }

private:
    int64_t rows_ = 0, batch_stride_;
    std::vector<int64_t> first_;
    std::vector<Value> data_;
};

// ------------------------------------------------------------------------------------------------
// One problem, in one element type

int failures = 0;

void compare(const std::string& what, const naive::Matrix& actual, const naive::Matrix& expected,
             double tolerance) {
    double error = 0, size = 0;
    for (size_t i = 0; i < expected.data.size(); ++i) {
        const double x = actual.data[i], y = expected.data[i];
        if (x == y) continue;  // -inf among others
        error += (x - y) * (x - y);
        size += y * y;
    }
    error = std::sqrt(error) / std::max(std::sqrt(size), 0.01);
    if (error <= tolerance) return;
    ++failures;
    std::printf("%s is off by %.2g\n", what.c_str(), error);
}

template <class Value>
class Trial {
    using Sum = std::conditional_t<std::is_same_v<Value, double>, double, float>;
    using R = Rows<Value>;
    using V = Vectors<Sum>;

public:
    explicit Trial(const Problem& problem)
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
        // A row that sees no key.
        if (problem.masked) std::fill_n(mask_.begin(), problem.keys[0], -kInfinity);
        for (size_t i = 0; i < batch(); ++i) {
            ends_q_.push_back(ends_q_.back() + problem.queries[i]);
            ends_k_.push_back(ends_k_.back() + problem.keys[i]);
        }
        for (R* x : {&k, &v, &tk, &tv}) x->poison(problem.used_keys, problem.keys, problem.heads_k);
        if (problem.masked)
            for (size_t i = 0; i < mask_.size(); ++i)
                if (column(i) >= used_keys(i / (problem.heads * mask_size())))
                    mask_[i] = tmask_[i] = kNaN;
    }

    void run(const Maps& maps, int threads) {
        AttentionParams p = params(threads);
        p.grad_q = p.grad_k = p.grad_v = {};
        maps.forward(p);
        p = params(threads);
        maps.backward(p);
    }

    void check(const std::string& what, double tolerance) {
        for (size_t sequence = 0; sequence < batch(); ++sequence)
            for (int head_k = 0; head_k < problem_.heads_k; ++head_k)
                check(what, sequence, head_k, tolerance);
    }

    bool equals(const Trial& other) const {
        const auto same = [](const auto& a, const auto& b) {
            return a.size() == b.size() &&
                   (a.empty() || !std::memcmp(a.data(), b.data(), a.size() * sizeof(a[0])));
        };
        bool all = same(grad_mask_, other.grad_mask_) && same(grad_tmask_, other.grad_tmask_);
        for (const auto x : {&Trial::out, &Trial::tout, &Trial::grad_q, &Trial::grad_k,
                             &Trial::grad_v, &Trial::grad_tq, &Trial::grad_tk, &Trial::grad_tv})
            all &= same((this->*x).data(), (other.*x).data());
        for (const auto x : {&Trial::lse, &Trial::mu})
            all &= same((this->*x).data(), (other.*x).data());
        return all;
    }

private:
    size_t batch() const { return problem_.queries.size(); }
    int64_t mask_size() const {
        return problem_.masked ? int64_t{problem_.queries[0]} * problem_.keys[0] : 0;
    }

    int used_keys(int sequence) const {
        return problem_.used_keys.empty() ? problem_.keys[sequence] : problem_.used_keys[sequence];
    }
    int column(size_t i) const { return i % problem_.keys[0]; }

    // Rows of keys of a sequence, without those that are not used.
    naive::Matrix without_padding(naive::Matrix x, int sequence) const {
        std::fill(x.data.begin() + int64_t{used_keys(sequence)} * x.columns, x.data.end(), 0);
        return x;
    }

    R queries(int columns) { return R(problem_.queries, problem_.heads, columns, problem_.packed); }
    R keys(int columns) { return R(problem_.keys, problem_.heads_k, columns, problem_.packed); }
    V rows() { return V(problem_.queries, problem_.heads, problem_.packed); }

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
        if (!problem_.only_q_moves) {
            p.tk = tk.tensor(), p.tv = tv.tensor();
            p.grad_tk = grad_tk.tensor(), p.grad_tv = grad_tv.tensor();
        }
        if (problem_.masked) {
            p.mask = mask_of(mask_), p.tmask = mask_of(tmask_);
            p.grad_mask = mask_of(grad_mask_), p.grad_tmask = mask_of(grad_tmask_);
        }
        if (problem_.packed) p.cu_seqlens_q = ends_q_.data(), p.cu_seqlens_k = ends_k_.data();
        if (!problem_.used_keys.empty()) p.seqused_k = problem_.used_keys.data();
        p.batch = static_cast<int>(batch());
        p.heads = problem_.heads, p.heads_k = problem_.heads_k;
        p.seqlen_q = problem_.queries[0], p.seqlen_k = problem_.keys[0];
        p.head_dim = problem_.head_dim, p.head_dim_v = problem_.head_dim_v;
        p.softmax_scale = .3;
        p.causal = problem_.causal;
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
        if (problem_.masked)
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
        if (!problem_.only_q_moves) x.tk = of_keys(tk), x.tv = of_keys(tv);
        x.mask = mask_matrix(mask_, sequence, head), x.tmask = mask_matrix(tmask_, sequence, head);
        const int used = used_keys(sequence);
        const int diagonal = problem_.causal == Causal::bottom_right ? used - n : 0;
        for (int i = 0; i < n; ++i)
            for (int j = 0; j < m; ++j) {
                if (j >= used) x.tmask(i, j) = 0;
                if (j >= used || (problem_.causal != Causal::no && j > i + diagonal))
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
        const auto is = [&](const char* name, const naive::Matrix& actual,
                            const naive::Matrix& expected) {
            compare(what + ": " + name, actual, expected, tolerance);
        };
        naive::Matrix gk(m, problem_.head_dim), gtk = gk, gv(m, problem_.head_dim_v), gtv = gv;
        for (int head = head_k * group; head < (head_k + 1) * group; ++head) {
            const naive::Head x = naive_head(sequence, head);
            is("out", out.matrix(sequence, head, n), x.out);
            is("lse", lse.matrix(sequence, head, n), x.lse);
            is("tout", tout.matrix(sequence, head, n), x.tout);
            is("mu", mu.matrix(sequence, head, n), x.mu);
            is("grad_q", grad_q.matrix(sequence, head, n), x.grad_q);
            is("grad_tq", grad_tq.matrix(sequence, head, n), x.grad_tq);
            if (problem_.masked) {
                is("grad_mask", mask_matrix(grad_mask_, sequence, head), x.grad_mask);
                is("grad_tmask", mask_matrix(grad_tmask_, sequence, head), x.grad_tmask);
            }
            gk = gk + x.grad_k, gv = gv + x.grad_v, gtk = gtk + x.grad_tk, gtv = gtv + x.grad_tv;
        }
        is("grad_k", grad_k.matrix(sequence, head_k, m), gk);
        is("grad_v", grad_v.matrix(sequence, head_k, m), gv);
        if (problem_.only_q_moves) return;
        is("grad_tk", grad_tk.matrix(sequence, head_k, m), gtk);
        is("grad_tv", grad_tv.matrix(sequence, head_k, m), gtv);
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
    std::vector<int32_t> ends_q_{0}, ends_k_{0};
};

template <class Value>
void try_maps(const Maps& maps, double tolerance) {
    constexpr int kThreads = 4;
    for (const Problem& problem : kProblems) {
        const std::string what = std::string(maps.instruction_set) + ", " +
                                 std::to_string(8 * sizeof(Value)) + " bits, " + problem.name;
        Trial<Value> by_many(problem), by_one(problem);
        by_many.run(maps, kThreads);
        if (tolerance < kInfinity) by_many.check(what, tolerance);
        by_one.run(maps, 1);
        if (by_one.equals(by_many)) continue;
        ++failures;
        std::printf("%s: results depend on the number of threads\n", what.c_str());
    }
}

}  // namespace

int main(int count, char** arguments) {
    const bool races = count > 1 && std::string(arguments[1]) == "races";
    for (const Maps* maps : maps_that_run_here()) {
        std::printf("%s\n", maps->instruction_set);
        try_maps<float>(*maps, races ? kInfinity : 1e-5);
        if (races) continue;
        try_maps<double>(*maps, 1e-12);
        try_maps<uint16_t>(*maps, 1e-2);
    }
    return failures != 0;
}
