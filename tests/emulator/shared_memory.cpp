#include "shared_memory.h"

#include <string>

namespace jvp_attn::emulator {

namespace {

constexpr int kWordBytes = 4;
constexpr int kCopyBytes = 16;
constexpr std::byte kPoison{0xff};  // NaN in every floating-point type

std::string text_of(SharedAddress address) {
    const int64_t offset = static_cast<int64_t>(address) - SharedMemory::kStart;
    return "shared_memory() " + std::string(offset < 0 ? "- " : "+ ") +
           std::to_string(offset < 0 ? -offset : offset);
}

[[noreturn]] void complain_of_conflict(const Actor& actor, const char* does, SharedAddress address,
                                       int other, const char* did, const Place& place) {
    fail(actor, std::string(does) + " " + text_of(address) + ", which thread " +
                    std::to_string(other) + " " + did + " (" + text(place) +
                    ") with no block_barrier between");
}

[[noreturn]] void complain_of_copy(const Actor& actor, int owner, const Place& place) {
    fail(actor, "touches what " + text(Actor{owner, "copy_async", place}) +
                    " is still copying: thread " + std::to_string(owner) +
                    " has not waited for it");
}

}  // namespace

void SharedMemory::start_block(std::size_t bytes) {
    bytes_.assign(bytes, kPoison);
    words_.assign((bytes + kWordBytes - 1) / kWordBytes, Word{});
    epoch_ = 1;
}

SharedMemory::Word* SharedMemory::words_at(const Actor& actor, SharedAddress address, int bytes) {
    const uint64_t offset = static_cast<uint64_t>(address) - kStart;  // huge where it is negative
    if (address % bytes != 0)
        fail(actor, text_of(address) + " is not aligned to " + std::to_string(bytes) + " bytes");
    if (offset > bytes_.size() || bytes_.size() - offset < static_cast<uint64_t>(bytes))
        fail(actor, std::to_string(bytes) + " bytes at " + text_of(address) +
                        " are outside of the block's " + std::to_string(bytes_.size()) +
                        " bytes of shared memory");
    return &words_[offset / kWordBytes];
}

const std::byte* SharedMemory::read(const Actor& actor, SharedAddress address, int bytes) {
    Word* words = words_at(actor, address, bytes);
    for (int i = 0; i < bytes / kWordBytes; ++i) {
        Word& word = words[i];
        if (word.in_flight) complain_of_copy(actor, word.writer, word.write_place);
        if (word.write_epoch == epoch_ && word.writer != actor.thread)
            complain_of_conflict(actor, "reads", address, word.writer, "wrote", word.write_place);
        if (word.read_epoch != epoch_) {
            word.read_epoch = epoch_;
            word.reader = word.other_reader = static_cast<uint16_t>(actor.thread);
            word.read_place = actor.where;
        } else if (word.reader != actor.thread) {
            word.other_reader = static_cast<uint16_t>(actor.thread);
        }
    }
    return &bytes_[address - kStart];
}

std::byte* SharedMemory::write(const Actor& actor, SharedAddress address, int bytes) {
    Word* words = words_at(actor, address, bytes);
    for (int i = 0; i < bytes / kWordBytes; ++i) {
        Word& word = words[i];
        if (word.in_flight) complain_of_copy(actor, word.writer, word.write_place);
        if (word.write_epoch == epoch_ && word.writer != actor.thread)
            complain_of_conflict(actor, "writes", address, word.writer, "wrote", word.write_place);
        const uint16_t reader = word.reader != actor.thread ? word.reader : word.other_reader;
        if (word.read_epoch == epoch_ && reader != actor.thread)
            complain_of_conflict(actor, "writes", address, reader, "read", word.read_place);
        word.write_epoch = epoch_;
        word.writer = static_cast<uint16_t>(actor.thread);
        word.write_place = actor.where;
    }
    return &bytes_[address - kStart];
}

void SharedMemory::start_copy(const Actor& actor, SharedAddress address) {
    write(actor, address, kCopyBytes);
    Word* words = words_at(actor, address, kCopyBytes);
    for (int i = 0; i < kCopyBytes / kWordBytes; ++i) words[i].in_flight = true;
}

std::byte* SharedMemory::finish_copy(SharedAddress address) {
    Word* words = &words_[(address - kStart) / kWordBytes];
    for (int i = 0; i < kCopyBytes / kWordBytes; ++i) {
        words[i].in_flight = false;
        words[i].write_epoch = epoch_;  // others see it after the next barrier
    }
    return &bytes_[address - kStart];
}

}  // namespace jvp_attn::emulator
