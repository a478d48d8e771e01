// The shared memory of a block, and a watch over who may touch which word of it when.
//
// Threads are ordered by block barriers only: a word that one thread writes and another reads or
// writes, with no barrier between them, is an error, whatever order the fibers happened to run in.
// That holds within a warp too, since neither shuffles nor matrix instructions order memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "report.h"

namespace jvp_attn::emulator {

using SharedAddress = uint32_t;

class SharedMemory {
public:
    // The machine promises a multiple of 128; this is a multiple of nothing more.
    static constexpr SharedAddress kStart = 1152;

    // A new block, whose memory is full of NaN.
    void start_block(std::size_t bytes);

    // All that threads did so far comes before all that they do from now on.
    void barrier() { ++epoch_; }

    // Check an access, aligned to its size, and return the place of its first byte.
    const std::byte* read(const Actor& actor, SharedAddress address, int bytes);
    std::byte* write(const Actor& actor, SharedAddress address, int bytes);

    // A copy in the background owns its 16 bytes from its start to its end: nobody may touch them.
    void start_copy(const Actor& actor, SharedAddress address);
    std::byte* finish_copy(SharedAddress address);

private:
    // Who touched four bytes. Whatever is of an earlier epoch is over.
    struct Word {
        uint32_t write_epoch = 0;
        uint32_t read_epoch = 0;
        uint16_t writer = 0;
        uint16_t reader = 0;
        uint16_t other_reader = 0;  // differs from reader if there are several
        bool in_flight = false;     // a copy of the writer's is under way
        Place write_place;
        Place read_place;
    };

    Word* words_at(const Actor& actor, SharedAddress address, int bytes);

    std::vector<std::byte> bytes_;
    std::vector<Word> words_;
    uint32_t epoch_ = 0;
};

}  // namespace jvp_attn::emulator
