// The shared memory of a block, with a race detector.
//
// It is an error if two threads access a word, one of them writes it, and no synchronization orders
// the two accesses, in whatever order the fibers ran. This includes threads of one warp, since
// shuffles and matrix instructions do not order memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "happens_before.h"
#include "report.h"

namespace jvp_attn::emulator {

using SharedAddress = uint32_t;

// "shared_memory() + 16"
std::string text_of(SharedAddress address);

class SharedMemory {
public:
    // The GPU guarantees an alignment of 1024; this is a multiple of no higher power of 2.
    static constexpr SharedAddress kStart = 1024;

    explicit SharedMemory(const HappensBefore& order) : order_(order) {}

    // Fills the memory with NaN.
    void start_block(std::size_t bytes);

    // Check an access of a thread, aligned to its size, and return its address on the host.
    const std::byte* read(const Actor& actor, SharedAddress address, int bytes);
    std::byte* write(const Actor& actor, SharedAddress address, int bytes);

    // The same for accesses of any agent, with any alignment.
    const std::byte* read(const Access& access, const Observer& observer, SharedAddress address,
                          int bytes, int alignment);
    std::byte* write(const Access& access, const Observer& observer, SharedAddress address,
                     int bytes, int alignment);

    // No thread may access the 16 bytes of an asynchronous copy from its start to its end. The copy
    // is a write of the thread that waits for it, or the count-th operation of another agent.
    void start_copy(const Actor& actor, SharedAddress address);
    void start_copy(const Access& access, const Observer& observer, SharedAddress address);
    std::byte* finish_copy(SharedAddress address);
    std::byte* finish_copy(SharedAddress address, uint32_t count);

    // The address on the host, for accesses that were checked before.
    const std::byte* at(SharedAddress address) const { return &bytes_[address - kStart]; }

private:
    struct Word {
        Access write;
        // The latest read of each agent since the write: that of the first reader, and those of the
        // others, sorted by agent.
        Access first_read;
        std::vector<Access> other_reads;
        bool in_flight = false;  // the write is a copy that is in flight
    };

    Word* words_at(const Actor& actor, SharedAddress address, int bytes, int alignment);
    void check_write_happens_before(const Word& word, const char* does, const Access& access,
                                    const Observer& observer, SharedAddress address) const;
    void check_reads_happen_before(const Word& word, const Access& access, const Observer& observer,
                                   SharedAddress address) const;
    void add_read(Word& word, const Access& access) const;
    void add_other_read(Word& word, const Access& access) const;
    [[noreturn]] void report_race(const Access& access, const Observer& observer, const char* does,
                                  SharedAddress address, const Access& other,
                                  const char* did) const;

    const HappensBefore& order_;
    std::vector<std::byte> bytes_;
    std::vector<Word> words_;
};

}  // namespace jvp_attn::emulator
