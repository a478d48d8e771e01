// The emulated CUtensorMap, with the rules of the CUDA driver's cuTensorMapEncodeTiled.
#pragma once

#include <cstdint>
#include <string>

namespace jvp_attn {

// A (column, row, head, batch) tensor of 2-byte elements, and a box of 64 columns by some rows, as
// csrc/sm90/ptx.cuh describes. All zeros: null.
struct alignas(64) TensorMap {
    static constexpr int kBoxColumns = 64;
    static constexpr int kRowBytes = 2 * kBoxColumns;

    const void* data = nullptr;
    uint64_t sizes[4] = {};
    uint64_t strides[4] = {};  // in bytes
    int box_rows = 0;

    int box_bytes() const { return box_rows * kRowBytes; }
};

std::string encode_tensor_map(TensorMap& map, const void* data, const uint64_t (&sizes)[4],
                              const uint64_t (&strides)[3], int box_rows);

}  // namespace jvp_attn
