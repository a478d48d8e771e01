// The naive formulas of attention, its JVP and the gradients of both, in double, for one head.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

namespace naive {

struct Matrix {
    int rows = 0, columns = 0;
    std::vector<double> data;

    Matrix() = default;
    Matrix(int r, int c) : rows(r), columns(c), data(size_t(r) * c) {}

    double& operator()(int i, int j) { return data[size_t(i) * columns + j]; }
    double operator()(int i, int j) const { return data[size_t(i) * columns + j]; }
};

inline Matrix transposed(const Matrix& a) {
    Matrix result(a.columns, a.rows);
    for (int i = 0; i < a.rows; ++i)
        for (int j = 0; j < a.columns; ++j) result(j, i) = a(i, j);
    return result;
}

inline Matrix operator*(const Matrix& a, const Matrix& b) {
    Matrix result(a.rows, b.columns);
    for (int i = 0; i < a.rows; ++i)
        for (int k = 0; k < a.columns; ++k)
            for (int j = 0; j < b.columns; ++j) result(i, j) += a(i, k) * b(k, j);
    return result;
}

template <class Function>
Matrix elementwise(const Matrix& a, const Matrix& b, Function f) {
    Matrix result(a.rows, a.columns);
    for (size_t i = 0; i < a.data.size(); ++i) result.data[i] = f(a.data[i], b.data[i]);
    return result;
}

inline Matrix operator+(const Matrix& a, const Matrix& b) {
    return elementwise(a, b, [](double x, double y) { return x + y; });
}

inline Matrix times(const Matrix& a, const Matrix& b) {
    return elementwise(a, b, [](double x, double y) { return x * y; });
}

inline Matrix operator*(double factor, Matrix a) {
    for (double& x : a.data) x *= factor;
    return a;
}

// Subtracts x(i) from each element of row i.
inline Matrix minus_rowwise(Matrix a, const Matrix& x) {
    for (int i = 0; i < a.rows; ++i)
        for (int j = 0; j < a.columns; ++j) a(i, j) -= x(i, 0);
    return a;
}

inline Matrix row_sums(const Matrix& a) {
    Matrix result(a.rows, 1);
    for (int i = 0; i < a.rows; ++i)
        for (int j = 0; j < a.columns; ++j) result(i, 0) += a(i, j);
    return result;
}

// All matrices have their full shapes; an absent input is zero. The mask is added to the scores.
struct Head {
    Matrix q, k, v, tq, tk, tv, mask, tmask;
    Matrix grad_out, grad_tout, grad_lse, grad_mu;
    double scale = 1;

    Matrix out, lse, tout, mu;
    Matrix grad_q, grad_k, grad_v, grad_mask, grad_tq, grad_tk, grad_tv, grad_tmask;

    void compute() {
        const Matrix s = scale * (q * transposed(k)) + mask;
        Matrix p(s.rows, s.columns);
        lse = Matrix(s.rows, 1);
        for (int i = 0; i < s.rows; ++i) {
            double sum = 0;
            for (int j = 0; j < s.columns; ++j) sum += std::exp(s(i, j));
            lse(i, 0) = std::log(sum);
            for (int j = 0; j < s.columns; ++j) p(i, j) = sum ? std::exp(s(i, j)) / sum : 0;
            if (sum) continue;
            grad_lse(i, 0) = grad_mu(i, 0) = 0;  // of a fully masked row
        }
        const Matrix t = scale * (tq * transposed(k) + q * transposed(tk)) + tmask;
        mu = row_sums(times(p, t));
        const Matrix ptc = times(p, minus_rowwise(t, mu));
        out = p * v;
        tout = ptc * v + p * tv;

        const Matrix beta = row_sums(times(grad_tout, out)) + -1. * grad_mu;
        const Matrix delta =
            row_sums(times(grad_out, out)) + row_sums(times(grad_tout, tout)) + -1. * grad_lse;
        const Matrix b = minus_rowwise(grad_tout * transposed(v), beta);
        const Matrix a = grad_out * transposed(v) + grad_tout * transposed(tv);
        grad_tmask = times(p, b);
        grad_mask = times(p, minus_rowwise(a + times(b, minus_rowwise(t, mu)), delta));
        grad_q = scale * (grad_mask * k + grad_tmask * tk);
        grad_k = scale * (transposed(grad_mask) * q + transposed(grad_tmask) * tq);
        grad_v = transposed(p) * grad_out + transposed(ptc) * grad_tout;
        grad_tq = scale * (grad_tmask * k);
        grad_tk = scale * (transposed(grad_tmask) * q);
        grad_tv = transposed(p) * grad_tout;
    }
};

}  // namespace naive
