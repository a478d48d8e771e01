// Scores of a tile, and the softmax of its rows.
#pragma once

#include "cpu/sequence.h"

namespace jvp_attn::cpu::JVP_ATTN_ISA {

// Scores of one query against the keys [first, first + keys), to whole panels: the mask is added,
// and what is hidden becomes -inf.
template <class Value>
inline void hide(Value* scores, const Sequence& sequence, const MaskOfHead<Value>& mask, int query,
                 int first, int keys) {
    if (mask) mask.add_to(scores, query, first, keys);
    const int visible = std::clamp(sequence.visible_keys(query) - first, 0, keys);
    std::fill(scores + visible, scores + round_up_to_panel<Value>(keys), -kInfinity<Value>);
}

template <class Value>
inline Value largest(const Value* x, int n) {
    Vector<Value> result = load(x);
    for (int j = kLanes<Value>; j < n; j += kLanes<Value>)
        result = larger<Value>(result, load(x + j));
    return largest_lane<Value>(result);
}

template <class Value>
inline Value sum(const Value* x, int n) {
    Vector<Value> result = load(x);
    for (int j = kLanes<Value>; j < n; j += kLanes<Value>) result += load(x + j);
    return sum_of_lanes<Value>(result);
}

template <class Value>
inline void scale(Value* x, int n, Value factor) {
    for (int j = 0; j < n; j += kLanes<Value>) store(x + j, load(x + j) * factor);
}

// T with zeros where a key is hidden, for what is hidden may hold NaN.
template <class Value>
inline void hide_tangents(Value* tangents, const Value* scores, int n) {
    for (int j = 0; j < n; j += kLanes<Value>) {
        const Vector<Value> zero = {};
        store(tangents + j, load(scores + j) == -kInfinity<Value> ? zero : load(tangents + j));
    }
}

// What a row of the softmax adds up to so far, in units of exp(maximum).
template <class Value>
struct RowSums {
    Value maximum = -kInfinity<Value>;
    Value weights = 0;   // sum of exp(S - maximum)
    Value tangents = 0;  // sum of exp(S - maximum) (T - centre)
    // About the mean of T: what T has in common along a row has no effect on tO, and without it no
    // digits are lost to it.
    Value centre = 0;
    bool has_centre = false;
    // NaN where the row sees a value, or a tangent of one, that is not finite.
    Value poison = 0, tpoison = 0;

    // Raise the maximum to that of further scores; returns the factor for what was summed before.
    Value raise(Value further) {
        if (!(further > maximum)) return 1;
        const Value factor = std::exp(maximum - further);
        maximum = further;
        weights *= factor;
        tangents *= factor;
        return factor;
    }

    // Scores become weights.
    void add(Value* scores, int n) {
        const Value from = maximum == -kInfinity<Value> ? 0 : maximum;
        Vector<Value> sum = {};
        for (int j = 0; j < n; j += kLanes<Value>) {
            const Vector<Value> p = exp_of_nonpositive<Value>(load(scores + j) - from);
            store(scores + j, p);
            sum += p;
        }
        weights += sum_of_lanes<Value>(sum);
    }

    // Scores become weights P, and their tangents P (T - centre).
    void add(Value* scores, Value* score_tangents, int n) {
        if (!has_centre && maximum > -kInfinity<Value>) {
            int visible = 0;
            for (int j = 0; j < n; ++j) visible += scores[j] != -kInfinity<Value>;
            centre = sum(score_tangents, n) / visible;
            has_centre = true;
        }
        add(scores, n);
        Vector<Value> sum = {};
        for (int j = 0; j < n; j += kLanes<Value>) {
            const Vector<Value> pt = load(scores + j) * (load(score_tangents + j) - centre);
            store(score_tangents + j, pt);
            sum += pt;
        }
        tangents += sum_of_lanes<Value>(sum);
    }

    // The factors of two sums of weighted rows that become one, and how far their centres differ.
    struct Junction {
        Value own, other, shift;
    };

    // Add the sums over other keys.
    Junction join(const RowSums& other) {
        const Value own_factor = raise(other.maximum);
        const Value factor =
            other.maximum == -kInfinity<Value> ? 0 : std::exp(other.maximum - maximum);
        if (!has_centre) {
            centre = other.centre;
            has_centre = other.has_centre;
        }
        const Value shift = other.has_centre ? other.centre - centre : 0;
        weights += factor * other.weights;
        tangents += factor * (other.tangents + shift * other.weights);
        poison += other.poison;
        tpoison += other.tpoison;
        return {own_factor, factor, shift};
    }
};

}  // namespace jvp_attn::cpu::JVP_ATTN_ISA
