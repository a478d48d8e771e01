// The buffers in global memory that a launch may access, and the checks of every access.
//
// Without buffers, only the alignment is checked.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "report.h"

namespace jvp_attn::emulator {

// Buffers may overlap, as the views of a packed tensor do.
struct Buffer {
    std::string name;
    std::uintptr_t start;
    std::size_t bytes;
    bool writable;
};

class GlobalMemory {
public:
    void set_buffers(std::vector<Buffer> buffers);

    // A new launch, in which no buffer has been written yet.
    void start_launch();

    void check_read(const Actor& actor, const void* address, std::size_t bytes,
                    std::size_t alignment) const;

    // It is also an error if two threads of a launch write the same place: the result would depend
    // on their order.
    void check_write(const Actor& actor, const void* address, std::size_t bytes);

    // Any number of threads may add to the same place, if no thread reads or writes it in the same
    // launch.
    void check_add(const Actor& actor, const void* address, std::size_t bytes);

private:
    // The block and thread that wrote two bytes of a buffer in this launch; 0 if none did.
    using Writer = uint64_t;
    static constexpr Writer kAdders = ~Writer{0};  // threads that add to them

    void mark(const Actor& actor, const void* address, std::size_t bytes, Writer self);
    const Buffer* find(std::uintptr_t start, std::size_t bytes, bool to_write) const;
    [[noreturn]] void report_bad_access(const Actor& actor, const std::string& access,
                                        std::uintptr_t start, std::size_t bytes) const;

    std::vector<Buffer> buffers_;
    std::vector<std::vector<Writer>> writers_;  // of each buffer
};

}  // namespace jvp_attn::emulator
