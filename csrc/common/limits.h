// What the kernels ask of memory, for host code: the extension shows these to Python.
#pragma once

namespace jvp_attn {

// The kernels of compute capability 9.0 load and store 16 bytes at a time: addresses and strides of
// tensors are multiples of that, in elements of 2 bytes of 8, and so are head dims.
constexpr int kTmaAlignmentBytes = 16;
constexpr int kTmaAlignmentElements = kTmaAlignmentBytes / 2;

// The rows of each sequence in dq_accum begin at a multiple of this.
constexpr int kDqAccumRowMultiple = 128;

}  // namespace jvp_attn
