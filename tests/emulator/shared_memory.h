// The shared memory of a block, and a watch over who may touch which word of it when.
//
// A word that one thread writes and another reads or writes, with nothing between them that orders
// the two, is an error, whatever order the fibers happened to run in. That holds within a warp too,
// since neither shuffles nor matrix instructions order memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "order.h"
#include "report.h"

namespace jvp_attn::emulator {

using SharedAddress = uint32_t;

// "shared_memory() + 16"
std::string text_of(SharedAddress address);

class SharedMemory {
public:
    // The machine promises a multiple of 1024; this is a multiple of nothing more.
    static constexpr SharedAddress kStart = 1024;

    explicit SharedMemory(const Order& order) : order_(order) {}

    // A new block, whose memory is full of NaN.
    void start_block(std::size_t bytes);

    // Check an access of a thread, aligned to its size, and return the place of its first byte.
    const std::byte* read(const Actor& actor, SharedAddress address, int bytes);
    std::byte* write(const Actor& actor, SharedAddress address, int bytes);

    // The same for accesses of any agent, and alignment of another size.
    const std::byte* read(const Access& access, const Observer& observer, SharedAddress address,
                          int bytes, int alignment);
    std::byte* write(const Access& access, const Observer& observer, SharedAddress address,
                     int bytes, int alignment);

    // A copy in the background owns its 16 bytes from its start to its end: nobody may touch them.
    // It is a write of the thread that waits for it, or the count-th deed of another agent.
    void start_copy(const Actor& actor, SharedAddress address);
    void start_copy(const Access& access, const Observer& observer, SharedAddress address);
    std::byte* finish_copy(SharedAddress address);
    std::byte* finish_copy(SharedAddress address, uint32_t count);

    // What is there, for accesses that were checked before.
    const std::byte* at(SharedAddress address) const { return &bytes_[address - kStart]; }

private:
    struct Word {
        Access write;
        // Since the write, the latest of each agent: that of the first to read, and of the others
        // in the order of agents.
        Access first_read;
        std::vector<Access> other_reads;
        bool in_flight = false;  // the write is a copy that is under way
    };

    Word* words_at(const Actor& actor, SharedAddress address, int bytes, int alignment);
    void check_write_is_over(const Word& word, const char* does, const Access& access,
                             const Observer& observer, SharedAddress address) const;
    void check_reads_are_over(const Word& word, const Access& access, const Observer& observer,
                              SharedAddress address) const;
    void add_read(Word& word, const Access& access) const;
    void add_other_read(Word& word, const Access& access) const;
    [[noreturn]] void complain(const Access& access, const Observer& observer, const char* does,
                               SharedAddress address, const Access& other, const char* did) const;

    const Order& order_;
    std::vector<std::byte> bytes_;
    std::vector<Word> words_;
};

}  // namespace jvp_attn::emulator
