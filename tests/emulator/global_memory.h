// The buffers in global memory that a launch may touch, and a check of every access to them.
//
// Where no buffer is named, nothing but the alignment is checked.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "report.h"

namespace jvp_attn::emulator {

// They may overlap: the views of a packed tensor do.
struct Buffer {
    std::string name;
    std::uintptr_t start;
    std::size_t bytes;
    bool writable;
};

class GlobalMemory {
public:
    void set_buffers(std::vector<Buffer> buffers);

    // A new launch: any thread may write any place once more.
    void start_launch();

    void check_read(const Actor& actor, const void* address, std::size_t bytes,
                    std::size_t alignment) const;

    // Two threads of a launch that write the same place are an error as well: the result would
    // depend on which is the last.
    void check_write(const Actor& actor, const void* address, std::size_t bytes);

    // Any number of threads may add to the same place, if none of them, nor any other, writes or
    // reads it in that launch.
    void check_add(const Actor& actor, const void* address, std::size_t bytes);

private:
    // Per two bytes of a buffer, who wrote them in this launch: a block and a thread, 0 for nobody.
    using Writer = uint64_t;
    static constexpr Writer kAdders = ~Writer{0};  // those who added to them

    void mark(const Actor& actor, const void* address, std::size_t bytes, Writer self);
    const Buffer* find(std::uintptr_t start, std::size_t bytes, bool to_write) const;
    [[noreturn]] void complain(const Actor& actor, const std::string& access, std::uintptr_t start,
                               std::size_t bytes) const;

    std::vector<Buffer> buffers_;
    std::vector<std::vector<Writer>> writers_;  // of each buffer
};

}  // namespace jvp_attn::emulator
