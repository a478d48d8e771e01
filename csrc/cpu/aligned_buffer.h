// Uninitialised memory that starts at a cache line, for tiles.
#pragma once

#include <cstdint>
#include <new>
#include <utility>

namespace jvp_attn::cpu {

template <class Value>
class AlignedBuffer {
public:
    explicit AlignedBuffer(int64_t size)
        : data_(static_cast<Value*>(::operator new(size * sizeof(Value), kAlignment))) {}
    ~AlignedBuffer() { ::operator delete(data_, kAlignment); }
    AlignedBuffer(AlignedBuffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}

    operator Value*() const { return data_; }
    Value* begin() const { return data_; }

private:
    static constexpr std::align_val_t kAlignment{64};
    Value* data_;
};

}  // namespace jvp_attn::cpu
