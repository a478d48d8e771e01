// What a kernel of compute capability 9.0 is given: one plain struct, passed by value.
#pragma once

#include "params.h"
#include "sm90/ptx.cuh"

namespace jvp_attn::sm90 {

// The inputs as the TMA sees them, under their names in AttentionParams; that of an absent
// tensor describes nothing.
struct TensorMaps {
    TensorMap q, k, v;
    TensorMap tq, tk, tv;
    TensorMap grad_out, grad_tout;
};

struct Params {
    static constexpr int kCapability = 90;  // that its kernels are for

    TensorMaps maps = {};
    AttentionParams attention;
    int32_t work = 0;    // how many pieces
    int32_t blocks = 0;  // of the grid
};

}  // namespace jvp_attn::sm90
