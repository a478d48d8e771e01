// exp(S − lse) for scores of any magnitude.
//
// The machine computes powers of 2. For ordinary rows one FFMA scales a score to units of log2 and
// subtracts lse. Where lse is huge, its rounding and that of the product would be errors of the
// exponent. Such scores are centred first, in natural units:
//
//     S − lse = (S − lse) − lse_lo
//
// lse_lo is the part of log(sum) that rounding took from lse = max + log(sum). Both differences are
// exact for the keys that count, because their scores are close to lse. All kernels round
// S = scale · (Q Kᵀ) + mask in the same way, so that a backward sees the scores of the forward.
#pragma once

#include "common/seqlen.cuh"

namespace jvp_attn {

// Beyond 256 in units of log2, where rounding to float32 is an error of 2^-17.
DEVICE bool is_huge(float score) { return fabsf(score) > 256 * kLn2; }

DEVICE bool is_huge_lse(float lse) { return is_huge(lse) && fabsf(lse) < kInfinity; }

// What is subtracted from scores: lse in units of log2, or in natural units if they are centred. It
// is +inf for a row that sees no key, whose weights become 0.
DEVICE float subtrahend_of(float lse, bool centred) {
    if (lse == -kInfinity) return kInfinity;
    return lse * (centred ? 1 : kLog2E);
}

// S − lse in units of log2. In exact arithmetic it is not positive.
DEVICE float centred(float score, float lse, float lse_lo) {
    const float difference = (score - lse) - lse_lo;
    return (difference > 0 ? 0 : difference) * kLog2E;
}

}  // namespace jvp_attn
