#include "global_memory.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "current.h"

namespace jvp_attn::emulator {

namespace {

constexpr std::size_t kGrain = 2;  // bytes; no kernel stores less

std::uintptr_t number_of(const void* address) { return reinterpret_cast<std::uintptr_t>(address); }

void check_alignment(const Actor& actor, const void* address, std::size_t alignment) {
    if (number_of(address) % alignment != 0)
        fail(actor, "the global address is " + std::to_string(number_of(address) % alignment) +
                        " bytes past a multiple of " + std::to_string(alignment) +
                        ", and it must be aligned to that");
}

// The distance of an access from a buffer that does not contain it, as a number and as text.
struct Distance {
    std::size_t bytes;
    std::string text;
};

Distance distance(const Buffer& buffer, std::uintptr_t start, std::size_t bytes) {
    if (start < buffer.start) {
        const std::size_t before = buffer.start - start;
        return {before, std::to_string(before) + " bytes before the start"};
    }
    const std::size_t last = start + bytes - 1;
    const std::size_t past = last - (buffer.start + buffer.bytes) + 1;
    return {past, std::to_string(past) + " bytes past the end"};
}

}  // namespace

void GlobalMemory::set_buffers(std::vector<Buffer> buffers) {
    buffers_ = std::move(buffers);
    writers_.assign(buffers_.size(), {});
}

void GlobalMemory::start_launch() {
    for (std::size_t i = 0; i < buffers_.size(); ++i)
        if (buffers_[i].writable) writers_[i].assign((buffers_[i].bytes + kGrain - 1) / kGrain, 0);
}

// The first buffer that contains the bytes, so that it is the same for all writers of a place.
const Buffer* GlobalMemory::find(std::uintptr_t start, std::size_t bytes, bool to_write) const {
    for (const Buffer& buffer : buffers_)
        if (start >= buffer.start && start - buffer.start + bytes <= buffer.bytes &&
            (buffer.writable || !to_write))
            return &buffer;
    return nullptr;
}

void GlobalMemory::report_bad_access(const Actor& actor, const std::string& access,
                                     std::uintptr_t start, std::size_t bytes) const {
    const std::string what = access + " " + std::to_string(bytes) + " bytes of global memory";
    if (const Buffer* buffer = find(start, bytes, false))
        fail(actor, what + " in " + buffer->name + ", which is read-only");

    const Buffer& nearest =
        *std::min_element(buffers_.begin(), buffers_.end(), [&](const Buffer& a, const Buffer& b) {
            return distance(a, start, bytes).bytes < distance(b, start, bytes).bytes;
        });
    fail(actor, what + " outside of every buffer: the nearest, " + nearest.name + ", has " +
                    std::to_string(nearest.bytes) + " bytes, and the access reaches " +
                    distance(nearest, start, bytes).text);
}

void GlobalMemory::check_read(const Actor& actor, const void* address, std::size_t bytes,
                              std::size_t alignment) const {
    check_alignment(actor, address, alignment);
    if (bytes == 0 || buffers_.empty()) return;
    const std::uintptr_t start = number_of(address);
    if (!find(start, bytes, false)) report_bad_access(actor, "reads", start, bytes);
    const Buffer* buffer = find(start, bytes, true);
    if (!buffer) return;
    const std::vector<Writer>& writers = writers_[buffer - buffers_.data()];
    const std::size_t offset = start - buffer->start;
    for (std::size_t i = offset / kGrain; i < (offset + bytes + kGrain - 1) / kGrain; ++i)
        if (writers[i] == kAdders)
            fail(actor, "reads byte " + std::to_string(i * kGrain) + " of " + buffer->name +
                            ", which threads add to in this launch");
}

void GlobalMemory::check_write(const Actor& actor, const void* address, std::size_t bytes) {
    mark(actor, address, bytes, static_cast<Writer>(current.block) << 32 | (actor.thread + 1));
}

void GlobalMemory::check_add(const Actor& actor, const void* address, std::size_t bytes) {
    mark(actor, address, bytes, kAdders);
}

void GlobalMemory::mark(const Actor& actor, const void* address, std::size_t bytes, Writer self) {
    check_alignment(actor, address, bytes);
    if (buffers_.empty()) return;
    const std::uintptr_t start = number_of(address);
    const Buffer* buffer = find(start, bytes, true);
    if (!buffer) report_bad_access(actor, "writes", start, bytes);

    std::vector<Writer>& writers = writers_[buffer - buffers_.data()];
    const std::size_t offset = start - buffer->start;
    for (std::size_t i = offset / kGrain; i < (offset + bytes + kGrain - 1) / kGrain; ++i) {
        const Writer writer = writers[i];
        if (writer != 0 && writer != self)
            fail(actor, "writes byte " + std::to_string(i * kGrain) + " of " + buffer->name +
                            (writer == kAdders
                                 ? ", which threads add to in this launch"
                                 : ", which thread " + std::to_string((writer & 0xffffffff) - 1) +
                                       " of block " + std::to_string(writer >> 32) +
                                       " has written in this launch"));
        writers[i] = self;
    }
}

}  // namespace jvp_attn::emulator
