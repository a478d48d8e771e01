#include "tma_loads.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

namespace jvp_attn::emulator {

namespace {

constexpr int kTargetAlignment = 1024;
constexpr int kCopyBytes = 16;

// The bytes of a row of a box that are within the tensor; the rest are zeros.
struct RowSource {
    const std::byte* data;
    int offset;  // in the row
    int bytes;
};

RowSource row_source(const TensorMap& map, const TmaLoads::Coordinates& start, int row) {
    const TmaLoads::Coordinates place = {0, start[1] + row, start[2], start[3]};
    const auto* data = static_cast<const std::byte*>(map.data);
    for (int dim = 1; dim < 4; ++dim) {
        if (place[dim] < 0 || static_cast<uint64_t>(place[dim]) >= map.sizes[dim])
            return {nullptr, 0, 0};
        data += place[dim] * map.strides[dim];
    }
    const int64_t columns = static_cast<int64_t>(map.sizes[0]);
    const int64_t first = std::clamp<int64_t>(start[0], 0, columns);
    const int64_t last = std::clamp<int64_t>(int64_t{start[0]} + map.kBoxColumns, 0, columns);
    return {data + 2 * first, static_cast<int>(2 * (first - start[0])),
            static_cast<int>(2 * (last - first))};
}

}  // namespace

void TmaLoads::issue(const Actor& actor, SharedAddress target, const TensorMap& map,
                     Mbarrier& barrier, const Coordinates& start, const HappensBefore& order,
                     SharedMemory& shared, const GlobalMemory& global) {
    if (map.data == nullptr) fail(actor, "the tensor map is null");
    if (target % kTargetAlignment != 0)
        fail(actor,
             text_of(target) + " is not aligned to " + std::to_string(kTargetAlignment) + " bytes");
    for (int row = 0; row < map.box_rows; ++row) {
        const RowSource source = row_source(map, start, row);
        if (source.bytes > 0) global.check_read(actor, source.data, source.bytes, 2);
    }
    const Access access = order.access(actor, barrier.agent(), barrier.operation());
    const Observer observer = order.observer(actor, true);
    for (int offset = 0; offset < map.box_bytes(); offset += kCopyBytes)
        shared.start_copy(access, observer, target + offset);
    loads_.push_back({actor, target, map, &barrier, start});
}

Mbarrier* TmaLoads::complete_one(Random& random, SharedMemory& shared) {
    std::swap(loads_[random.next() % loads_.size()], loads_.back());
    const Load load = loads_.back();
    loads_.pop_back();
    for (int row = 0; row < load.map.box_rows; ++row) {
        std::byte bytes[TensorMap::kRowBytes] = {};
        const RowSource source = row_source(load.map, load.start, row);
        if (source.bytes > 0) std::memcpy(bytes + source.offset, source.data, source.bytes);
        for (int offset = 0; offset < load.map.kRowBytes; offset += kCopyBytes) {
            const SharedAddress place = swizzled(load.target + row * load.map.kRowBytes + offset);
            std::memcpy(shared.finish_copy(place, load.barrier->operation()), bytes + offset,
                        kCopyBytes);
        }
    }
    return load.barrier->count_copy(load.actor, load.map.box_bytes()) ? load.barrier : nullptr;
}

}  // namespace jvp_attn::emulator
