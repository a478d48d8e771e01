#include "tensor_map.h"

#include <algorithm>

namespace jvp_attn {

std::string encode_tensor_map(TensorMap& map, const void* data, const uint64_t (&sizes)[4],
                              const uint64_t (&strides)[3], int box_rows) {
    const std::string refused = "the CUDA driver refuses a tensor map: ";
    const auto address = reinterpret_cast<std::uintptr_t>(data);
    if (address == 0 || address % 16 != 0)
        return refused + "the address " + std::to_string(address) + " is no multiple of 16";
    for (const uint64_t size : sizes)
        if (size == 0 || size > uint64_t{1} << 32)
            return refused + "a size of " + std::to_string(size) + "; it can be 1 to 2^32";
    for (const uint64_t stride : strides)
        if (stride % 16 != 0 || stride >= uint64_t{1} << 40)
            return refused + "a stride of " + std::to_string(stride) +
                   " bytes; it can be a multiple of 16 below 2^40";
    if (box_rows < 1 || box_rows > 256)
        return refused + "a box of " + std::to_string(box_rows) + " rows; it can have 1 to 256";

    map.data = data;
    std::copy_n(sizes, 4, map.sizes);
    map.strides[0] = 2;
    std::copy_n(strides, 3, map.strides + 1);
    map.box_rows = box_rows;
    return "";
}

}  // namespace jvp_attn
