// The accuracy of exp in vector.h and the rounding in half.h, for one instruction set.
#include <cstdio>
#include <limits>

#include "cpu/isa_kernels.h"

using namespace jvp_attn::cpu::JVP_ATTN_ISA;

namespace {

#if defined(__aarch64__)
using Float16 = __fp16;
#else
using Float16 = _Float16;
#endif

int failures = 0;

void check(bool condition, const char* what, double where) {
    if (condition) return;
    if (failures++ < 10) std::printf("%s at %.17g\n", what, where);
}

template <class Value>
Value exp_of(Value x) {
    return exp_of_nonpositive<Value>(broadcast(x))[0];
}

// In ulp of the exact value.
template <class Value>
double error_of_exp(Value x) {
    using Exact = std::conditional_t<std::is_same_v<Value, float>, double, long double>;
    const Exact exact = std::exp(static_cast<Exact>(x));
    int exponent;
    std::frexp(exact, &exponent);
    const Exact ulp = std::ldexp(Exact(1), exponent - std::numeric_limits<Value>::digits);
    return std::fabs((exp_of(x) - exact) / ulp);
}

template <class Value>
void check_exp(double step) {
    using Integer = typename ExpConstants<Value>::Integer;
    const Value least = std::numeric_limits<Value>::min();
    const Value smallest = std::nextafter(std::log(least), Value(0));
    double worst = 0;
    for (Value x = -std::numeric_limits<Value>::denorm_min(); x >= smallest;
         x = std::min<Value>(x * (1 + step), std::nextafter(x, -kInfinity<Value>))) {
        const double error = error_of_exp(x);
        check(error <= 2, "exp has an error above 2 ulp", x);
        worst = std::max(worst, error);
    }
    check(worst > 0, "exp was not tested", smallest);
    check(exp_of<Value>(0) == 1, "exp is not 1", 0);
    for (Value x = smallest; x > ExpConstants<Value>::kZero; x *= 1 + 1e-6)
        check(exp_of(x) >= 0 && exp_of(x) < 1.001 * least, "exp is not tiny", x);
    for (const Value x :
         {ExpConstants<Value>::kZero, std::numeric_limits<Value>::lowest(), -kInfinity<Value>})
        check(exp_of(x) == 0, "exp is not 0", x);
    for (const Value x :
         {std::numeric_limits<Value>::quiet_NaN(), std::bit_cast<Value>(Integer(-1)),
          std::bit_cast<Value>(std::numeric_limits<Integer>::max())})
        check(std::isnan(exp_of(x)), "exp is not NaN", 0);
    std::printf("exp of %zu bytes: %.3f ulp\n", sizeof(Value), worst);
}

void check_same(float actual, float expected, const char* what, double where) {
    const bool same = std::bit_cast<uint32_t>(actual) == std::bit_cast<uint32_t>(expected);
    check(same || (std::isnan(actual) && std::isnan(expected)), what, where);
}

void check_float16() {
    for (int bits = 0; bits < 1 << 16; ++bits)
        check_same(float_from_float16(bits), float(std::bit_cast<Float16>(uint16_t(bits))),
                   "float16 is read wrong", bits);
    for (uint64_t bits = 0; bits < uint64_t{1} << 32; bits += 1021) {
        const float x = std::bit_cast<float>(uint32_t(bits));
        check_same(float_from_float16(float16_from_float(x)), float(Float16(x)),
                   "float16 is rounded wrong", x);
    }
}

void check_bfloat16() {
    for (uint64_t bits = 0; bits < uint64_t{1} << 32; bits += 1021) {
        const float x = std::bit_cast<float>(uint32_t(bits));
        const float rounded = float_from_bfloat16(bfloat16_from_float(x));
        if (!std::isfinite(x)) {
            check_same(rounded, x, "bfloat16 loses infinity or NaN", x);
            continue;
        }
        // To the nearest, ties to even.
        const uint32_t below = bits & 0xffff0000, rest = bits & 0xffff;
        const bool up = rest > 0x8000 || (rest == 0x8000 && (below & 0x10000));
        check_same(rounded, std::bit_cast<float>(below + (up ? 0x10000 : 0)),
                   "bfloat16 is rounded wrong", x);
    }
}

}  // namespace

int main() {
    check_exp<float>(1e-5);
    check_exp<double>(1e-3);
    check_float16();
    check_bfloat16();
    return failures != 0;
}
