// Masking of scores, and the online softmax of a row with its tangent.
#pragma once

#include <algorithm>
#include <cmath>

#include "cpu/gemm.h"
#include "cpu/mask.h"
#include "cpu/seqlen.h"

namespace jvp_attn::cpu::JVP_ATTN_ISA {

// Masks the scores of one query against the keys [first, first + keys): adds the mask and sets
// scores of masked keys, and those that fill up the last panel, to -inf.
template <class Value>
inline void apply_mask(Value* scores, const SeqlenInfo& seqlen, const MaskOfHead<Value>& mask,
                       int query, int first, int keys) {
    if (mask) mask.add_to(scores, query, first, keys);
    const int visible = std::clamp(seqlen.visible_keys(query) - first, 0, keys);
    std::fill(scores + visible, scores + round_up_to_panel<Value>(keys), -kInfinity<Value>);
}

template <class Value>
inline Value max_of(const Value* x, int n) {
    Vector<Value> result = load(x);
    for (int j = kLanes<Value>; j < n; j += kLanes<Value>)
        result = maximum<Value>(result, load(x + j));
    return max_of_lanes<Value>(result);
}

template <class Value>
inline Value sum_of(const Value* x, int n) {
    Vector<Value> result = load(x);
    for (int j = kLanes<Value>; j < n; j += kLanes<Value>) result += load(x + j);
    return sum_of_lanes<Value>(result);
}

// The sum of x, weighted by weights * factor.
template <class Value>
inline Value weighted_sum(const Value* weights, Value factor, const Value* x, int n) {
    Vector<Value> result = {};
    for (int j = 0; j < n; j += kLanes<Value>) result += load(weights + j) * factor * load(x + j);
    return sum_of_lanes<Value>(result);
}

template <class Value>
inline void scale(Value* x, int n, Value factor) {
    for (int j = 0; j < n; j += kLanes<Value>) store(x + j, load(x + j) * factor);
}

// Sets T to zero where a key is masked: it may be NaN there.
template <class Value>
inline void zero_masked_tangents(Value* tscores, const Value* scores, int n) {
    for (int j = 0; j < n; j += kLanes<Value>) {
        const Vector<Value> zero = {};
        store(tscores + j, load(scores + j) == -kInfinity<Value> ? zero : load(tscores + j));
    }
}

// How `OnlineSoftmax::merge` combines two rows: own * x + other * y. The tangents of the other row
// are relative to its centre, which exceeds this row's by `shift`.
template <class Value>
struct MergeFactors {
    Value own, other, shift;
};

// The state of one row of the softmax after some of the keys.
template <class Value>
struct OnlineSoftmax {
    Value row_max = -kInfinity<Value>;
    Value row_sum = 0;   // sum of exp(S - row_max)
    Value trow_sum = 0;  // sum of exp(S - row_max) (T - centre)
    // The mean of T, weighted by P, in the first tile whose weights are not 0. A constant in T has
    // no effect on tO, but without subtracting it the sums would lose digits to cancellation.
    Value centre = 0;
    bool has_centre = false;
    // NaN if the row sees a key whose value (for `tnan`: whose value or tangent) is not finite.
    Value nan = 0, tnan = 0;

    // Raises row_max to at least `tile_max`. Returns the factor that rescales earlier sums.
    Value update_max(Value tile_max) {
        if (!(tile_max > row_max)) return 1;
        const Value factor = std::exp(row_max - tile_max);
        row_max = tile_max;
        row_sum *= factor;
        trow_sum *= factor;
        if (factor == 0) has_centre = false;
        return factor;
    }

    // Replaces S by P = exp(S - row_max), adds P to the row sum, and returns the sum of P.
    Value update(Value* scores, int n) {
        const Value subtrahend = row_max == -kInfinity<Value> ? 0 : row_max;
        Vector<Value> sum = {};
        for (int j = 0; j < n; j += kLanes<Value>) {
            const Vector<Value> p = exp_of_nonpositive<Value>(load(scores + j) - subtrahend);
            store(scores + j, p);
            sum += p;
        }
        const Value tile_sum = sum_of_lanes<Value>(sum);
        row_sum += tile_sum;
        return tile_sum;
    }

    // Replaces S by P and T by P (T - centre), and adds both to their row sums.
    void update(Value* scores, Value* tscores, int n) {
        const Value tile_sum = update(scores, n);
        if (!has_centre && tile_sum > 0) {
            centre = weighted_sum(scores, 1 / tile_sum, tscores, n);
            has_centre = true;
        }
        Vector<Value> sum = {};
        for (int j = 0; j < n; j += kLanes<Value>) {
            const Vector<Value> pt = load(scores + j) * (load(tscores + j) - centre);
            store(tscores + j, pt);
            sum += pt;
        }
        trow_sum += sum_of_lanes<Value>(sum);
    }

    // Adds the state of the same row after other keys.
    MergeFactors<Value> merge(const OnlineSoftmax& other) {
        const Value own_factor = update_max(other.row_max);
        const Value factor =
            other.row_max == -kInfinity<Value> ? 0 : std::exp(other.row_max - row_max);
        if (!has_centre) {
            centre = other.centre;
            has_centre = other.has_centre;
        }
        const Value shift = other.has_centre ? other.centre - centre : 0;
        row_sum += factor * other.row_sum;
        trow_sum += factor * (other.trow_sum + shift * other.row_sum);
        nan += other.nan;
        tnan += other.tnan;
        return {own_factor, factor, shift};
    }
};

}  // namespace jvp_attn::cpu::JVP_ATTN_ISA
