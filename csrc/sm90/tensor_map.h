// The tensor maps (TMA descriptors) of a launch. To encode one in the driver takes time, and calls
// repeat the same tensors, so each thread caches the maps that it encoded last.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>

#include "sm90/params.cuh"

namespace jvp_attn::sm90 {

// Everything that a tensor map depends on, without padding: keys are equal if their bytes are.
struct TensorMapKey {
    uint64_t data;
    uint64_t sizes[4];    // columns, rows, heads, batches
    uint64_t strides[3];  // of rows, heads and batches, in bytes
    uint64_t box_rows;

    bool operator==(const TensorMapKey& other) const {
        return std::memcmp(this, &other, sizeof *this) == 0;
    }

    std::size_t hash() const {
        uint64_t words[sizeof(TensorMapKey) / 8], hash = 0;
        std::memcpy(words, this, sizeof words);
        for (const uint64_t word : words) hash = (hash ^ word) * 0x9e3779b97f4a7c15;
        return hash >> 32;
    }
};

// Sets `map` to the map of a key, from the cache if it is there. Returns an error, empty if none.
inline std::string find_tensor_map(TensorMap& map, const TensorMapKey& key) {
    struct Entry {
        TensorMapKey key;
        TensorMap map;
    };
    thread_local std::array<Entry, 256> cache = {};

    Entry& entry = cache[key.hash() % cache.size()];
    if (!(entry.key == key)) {
        const auto* data = reinterpret_cast<const void*>(key.data);
        if (std::string error = encode_tensor_map(entry.map, data, key.sizes, key.strides,
                                                  static_cast<int>(key.box_rows));
            !error.empty()) {
            entry.key = {};
            return error;
        }
        entry.key = key;
    }
    map = entry.map;
    return "";
}

// A dimension of size 1 may have any stride; the driver gets one that it accepts.
inline uint64_t stride_in_bytes(uint64_t size, int64_t stride) {
    return size == 1 ? kTmaAlignmentBytes : static_cast<uint64_t>(2 * stride);
}

// Encodes the maps of all tensors that are not absent. `row_box` and `key_box` are the rows of a
// TMA box of queries and of keys. Returns an error, empty if none.
inline std::string encode_tensor_maps(Params& params, int row_box, int key_box) {
    const AttentionParams& p = params.attention;
    const auto encode = [&](TensorMap& map, const char* name, const Tensor& x, bool of_keys,
                            int columns) -> std::string {
        if (!x.data) return "";
        const Extent extent(p, of_keys);
        TensorMapKey key = {};
        key.data = reinterpret_cast<uintptr_t>(x.data);
        key.sizes[0] = columns;
        key.sizes[1] = extent.rows;
        key.sizes[2] = extent.heads;
        key.sizes[3] = extent.batches;
        key.strides[0] = stride_in_bytes(key.sizes[1], x.row_stride);
        key.strides[1] = stride_in_bytes(key.sizes[2], x.head_stride);
        key.strides[2] = stride_in_bytes(key.sizes[3], x.batch_stride);
        key.box_rows = of_keys ? key_box : row_box;
        if (std::string error = find_tensor_map(map, key); !error.empty())
            return std::string(name) + ": " + error;
        return "";
    };

    TensorMaps& maps = params.maps;
    for (const std::string& error : {
             encode(maps.q, "q", p.q, false, p.head_dim),
             encode(maps.tq, "tq", p.tq, false, p.head_dim),
             encode(maps.grad_out, "grad_out", p.grad_out, false, p.head_dim_v),
             encode(maps.grad_tout, "grad_tout", p.grad_tout, false, p.head_dim_v),
             encode(maps.k, "k", p.k, true, p.head_dim),
             encode(maps.tk, "tk", p.tk, true, p.head_dim),
             encode(maps.v, "v", p.v, true, p.head_dim_v),
             encode(maps.tv, "tv", p.tv, true, p.head_dim_v),
         })
        if (!error.empty()) return error;
    return "";
}

}  // namespace jvp_attn::sm90
