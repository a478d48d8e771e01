// SIMD vectors in the vector extensions of GCC and Clang: operators work lane by lane.
//
// A source that includes this defines JVP_ATTN_VECTOR_BYTES and JVP_ATTN_ISA, a namespace for each
// instruction set, so that the linker cannot replace a function by that of another instruction set.
#pragma once

#include <cstdint>
#include <limits>

namespace jvp_attn::cpu::JVP_ATTN_ISA {

template <class Value>
struct VectorTypes {
    typedef Value Aligned __attribute__((vector_size(JVP_ATTN_VECTOR_BYTES)));
    typedef Value Anywhere
        __attribute__((vector_size(JVP_ATTN_VECTOR_BYTES), aligned(alignof(Value)), may_alias));
};

template <class Value>
using Vector = typename VectorTypes<Value>::Aligned;

template <class Value>
constexpr int kLanes = JVP_ATTN_VECTOR_BYTES / sizeof(Value);

template <class Value>
inline Vector<Value> load(const Value* from) {
    return *reinterpret_cast<const typename VectorTypes<Value>::Anywhere*>(from);
}

template <class Value>
inline void store(Value* to, Vector<Value> x) {
    *reinterpret_cast<typename VectorTypes<Value>::Anywhere*>(to) = x;
}

template <class Value>
inline Vector<Value> broadcast(Value x) {
    return x - Vector<Value>{};
}

template <class Value>
inline Vector<Value> maximum(Vector<Value> a, Vector<Value> b) {
    return a > b ? a : b;
}

template <class Value>
inline Value sum_of_lanes(Vector<Value> x) {
    Value sum = 0;
    for (int i = 0; i < kLanes<Value>; ++i) sum += x[i];
    return sum;
}

template <class Value>
inline Value max_of_lanes(Vector<Value> x) {
    Value result = x[0];
    for (int i = 1; i < kLanes<Value>; ++i) result = x[i] > result ? x[i] : result;
    return result;
}

// The constants of exp for a floating point type:
// - kRounder: adding it rounds to an integer, since a sum of its size has no fraction bits.
// - kLn2High + kLn2Low = ln 2; kLn2High has trailing zeros, so that n * kLn2High is exact.
// - kCoefficients: c_n, ..., c_2 of the polynomial 1 + x + c_2 x^2 + ... + c_n x^n whose maximal
//   relative error on [-ln 2 / 2, ln 2 / 2] is smallest.
template <class Value>
struct ExpConstants;

template <>
struct ExpConstants<float> {
    using Integer = int32_t;
    static constexpr int kMantissaBits = 23, kBias = 127;
    static constexpr float kRounder = 12582912.f;  // 1.5 * 2^23
    static constexpr float kLn2High = 0.693145752f, kLn2Low = 1.42860677e-6f;
    static constexpr float kZero = -88.03f;  // below -127 ln 2
    // Relative error 3.1e-9.
    static constexpr float kCoefficients[] = {1.3814467e-3f, 8.368781e-3f, 4.1668393e-2f,
                                              1.666652e-1f, 4.9999994e-1f};
};

template <>
struct ExpConstants<double> {
    using Integer = int64_t;
    static constexpr int kMantissaBits = 52, kBias = 1023;
    static constexpr double kRounder = 6755399441055744.;  // 1.5 * 2^52
    static constexpr double kLn2High = 6.93147180369123816490e-01,
                            kLn2Low = 1.90821492927058770002e-10;
    static constexpr double kZero = -709.09;
    // Relative error 3.7e-18.
    static constexpr double kCoefficients[] = {2.4999965343255924e-08, 2.763037862080518e-07,
                                               2.755758734220382e-06,  2.4801492762795647e-05,
                                               1.9841269504765357e-04, 1.388888894392264e-03,
                                               8.333333333495624e-03,  4.166666666652919e-02,
                                               1.666666666666641e-01,  5.000000000000011e-01};
};

// exp(x) for x <= 0, to 2 ulp where the result is normal; 0 for x <= kZero, NaN for NaN.
template <class Value>
inline Vector<Value> exp_of_nonpositive(Vector<Value> x) {
    using E = ExpConstants<Value>;
    typedef typename E::Integer Integers __attribute__((vector_size(JVP_ATTN_VECTOR_BYTES)));
    const Vector<Value> zero = broadcast(E::kZero);
    x = zero > x ? zero : x;  // keeps NaN
    // x = n ln 2 + rest, with n an integer and |rest| <= ln 2 / 2.
    constexpr Value kShift = E::kRounder + E::kBias;
    const Vector<Value> shifted = x * Value(1.44269504088896340736) + kShift;
    const Vector<Value> n = shifted - kShift;
    const Vector<Value> rest = (x - n * E::kLn2High) - n * E::kLn2Low;
    // exp(rest)
    Vector<Value> polynomial = broadcast(E::kCoefficients[0]);
    for (unsigned i = 1; i < sizeof(E::kCoefficients) / sizeof(Value); ++i)
        polynomial = polynomial * rest + E::kCoefficients[i];
    polynomial = (polynomial * rest + Value(1)) * rest + Value(1);
    // 2^n: the lowest bits of `shifted` hold the integer n + kBias, the exponent field of 2^n. For
    // n = -kBias this is 0.
    return polynomial * (Vector<Value>)((Integers)shifted << E::kMantissaBits);
}

}  // namespace jvp_attn::cpu::JVP_ATTN_ISA
