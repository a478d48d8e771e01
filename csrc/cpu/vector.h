// SIMD vectors of the instruction set that a source is compiled for, by the vector extensions that
// GCC and Clang share: operators work lane by lane.
//
// Such a source defines JVP_ATTN_ISA, a namespace of its own, so that no function compiled for one
// instruction set can stand in for another's, and JVP_ATTN_VECTOR_BYTES.
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
inline Vector<Value> in_all_lanes(Value x) {
    return x - Vector<Value>{};
}

template <class Value>
inline Vector<Value> larger(Vector<Value> a, Vector<Value> b) {
    return a > b ? a : b;
}

template <class Value>
inline Value sum_of_lanes(Vector<Value> x) {
    Value sum = 0;
    for (int i = 0; i < kLanes<Value>; ++i) sum += x[i];
    return sum;
}

template <class Value>
inline Value largest_lane(Vector<Value> x) {
    Value largest = x[0];
    for (int i = 1; i < kLanes<Value>; ++i) largest = x[i] > largest ? x[i] : largest;
    return largest;
}

// What exp needs to know of a floating type: rounding to an integer by adding a number so large
// that no fraction is left, ln 2 in two parts of which the first has trailing zeros, where results
// would be subnormal, and a polynomial for exp on [-ln 2 / 2, ln 2 / 2].
template <class Value>
struct Exponential;

template <>
struct Exponential<float> {
    using Integer = int32_t;
    static constexpr int kMantissaBits = 23;
    static constexpr float kRounder = 12582912.f;  // 1.5 * 2^23
    static constexpr float kLn2High = 0.693145752f, kLn2Low = 1.42860677e-6f;
    static constexpr float kSmallest = -87.3f;
    // 1/7!, ..., 1/2!: the first that is left out is 5e-9 at most.
    static constexpr float kCoefficients[] = {1.98412698e-4f, 1.38888889e-3f, 8.33333333e-3f,
                                              4.16666667e-2f, 1.66666667e-1f, 0.5f};
};

template <>
struct Exponential<double> {
    using Integer = int64_t;
    static constexpr int kMantissaBits = 52;
    static constexpr double kRounder = 6755399441055744.;  // 1.5 * 2^52
    static constexpr double kLn2High = 6.93147180369123816490e-01,
                            kLn2Low = 1.90821492927058770002e-10;
    static constexpr double kSmallest = -708.3;
    // 1/13!, ..., 1/2!
    static constexpr double kCoefficients[] = {
        1.6059043836821613e-10, 2.0876756987868099e-09, 2.5052108385441720e-08,
        2.7557319223985893e-07, 2.7557319223985888e-06, 2.4801587301587302e-05,
        1.9841269841269841e-04, 1.3888888888888889e-03, 8.3333333333333332e-03,
        4.1666666666666664e-02, 1.6666666666666666e-01, 0.5};
};

// exp of what is not positive, to 2 ulp; 0 where that would be subnormal, NaN of NaN.
template <class Value>
inline Vector<Value> exp_of_nonpositive(Vector<Value> x) {
    using E = Exponential<Value>;
    typedef typename E::Integer Integers __attribute__((vector_size(JVP_ATTN_VECTOR_BYTES)));
    const Vector<Value> smallest = in_all_lanes(E::kSmallest);
    const Vector<Value> inside = x < smallest ? smallest : x;
    const Vector<Value> shifted = inside * Value(1.44269504088896340736) + E::kRounder;
    const Vector<Value> n = shifted - E::kRounder;
    const Vector<Value> rest = (inside - n * E::kLn2High) - n * E::kLn2Low;
    Vector<Value> polynomial = in_all_lanes(E::kCoefficients[0]);
    for (unsigned i = 1; i < sizeof(E::kCoefficients) / sizeof(Value); ++i)
        polynomial = polynomial * rest + E::kCoefficients[i];
    const Vector<Value> mantissa = polynomial * rest * rest + rest + Value(1);
    // The integer n stands in the lowest bits of `shifted`: add it to the exponent.
    const Integers bits = (Integers)mantissa + ((Integers)shifted << E::kMantissaBits);
    return x < smallest ? Vector<Value>{} : (Vector<Value>)bits;
}

}  // namespace jvp_attn::cpu::JVP_ATTN_ISA
