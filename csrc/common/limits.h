// The kernels' demands on memory, for host code: the Python extension exports these constants.
#pragma once

namespace jvp_attn {

// The kernels of compute capability 9.0 load and store 16 bytes at a time: addresses and strides
// of tensors are multiples of 16 bytes, and head dims multiples of 8 elements of 2 bytes.
constexpr int kTmaAlignmentBytes = 16;
constexpr int kTmaAlignmentElements = kTmaAlignmentBytes / 2;

// The rows of each sequence in dq_accum begin at a multiple of this.
constexpr int kDqAccumRowMultiple = 128;

}  // namespace jvp_attn
