// The arguments of the driver's cuTensorMapEncodeTiled, recorded. No driver is needed: csrc and
// CuTe look the function up in the CUDA runtime, and tensor_maps_csrc.cpp is the runtime here.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace witness_tma {

struct EncodeCall {
    uint64_t address;
    int element_bytes;
    int rank;
    uint64_t sizes[5];
    uint64_t strides[4];  // in bytes; that of columns is not an argument
    uint32_t box[5];
    uint32_t element_strides[5];
    int interleave, swizzle, fill;
};

// All calls so far, of csrc and of CuTe.
inline std::vector<EncodeCall> encode_calls;

// A (batch, row, head, column) tensor of 2-byte elements; strides are in elements.
struct TensorView {
    uint64_t address;
    int64_t batches, rows, heads, columns;
    int64_t batch_stride, row_stride, head_stride;
};

// csrc/sm90/tensor_map.h encodes the map of a tensor of queries or of keys, with boxes of
// `box_rows` rows. Returns its error, empty if none.
std::string encode_by_csrc(const TensorView& x, bool of_keys, int box_rows);

}  // namespace witness_tma
