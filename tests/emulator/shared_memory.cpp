#include "shared_memory.h"

#include <algorithm>
#include <string>

namespace jvp_attn::emulator {

namespace {

constexpr int kWordBytes = 4;
constexpr int kCopyBytes = 16;
constexpr std::byte kPoison{0xff};  // NaN in every floating-point type

}  // namespace

std::string text_of(SharedAddress address) {
    const int64_t offset = static_cast<int64_t>(address) - SharedMemory::kStart;
    return "shared_memory() " + std::string(offset < 0 ? "- " : "+ ") +
           std::to_string(offset < 0 ? -offset : offset);
}

void SharedMemory::start_block(std::size_t bytes) {
    bytes_.assign(bytes, kPoison);
    // Words are kept: their accesses are settled, and clearing them would take longer.
    words_.resize((bytes + kWordBytes - 1) / kWordBytes);
    for (Word& word : words_) word.in_flight = false;
}

SharedMemory::Word* SharedMemory::words_at(const Actor& actor, SharedAddress address, int bytes,
                                           int alignment) {
    const uint64_t offset = static_cast<uint64_t>(address) - kStart;  // huge if it is negative
    if (address % alignment != 0)
        fail(actor,
             text_of(address) + " is not aligned to " + std::to_string(alignment) + " bytes");
    if (offset > bytes_.size() || bytes_.size() - offset < static_cast<uint64_t>(bytes))
        fail(actor, std::to_string(bytes) + " bytes at " + text_of(address) +
                        " are outside of the block's " + std::to_string(bytes_.size()) +
                        " bytes of shared memory");
    return &words_[offset / kWordBytes];
}

void SharedMemory::report_race(const Access& access, const Observer& observer, const char* does,
                               SharedAddress address, const Access& other, const char* did) const {
    std::string missing = "barrier";
    if (!order_.is_thread(other.agent))
        missing = "wait for it";
    else if (observer.async_proxy && order_.happens_before(other, {observer.clocks, false}))
        missing = "fence_proxy_async of thread " + std::to_string(other.agent);
    fail(access.actor, std::string(does) + " " + text_of(address) + ", which " + text(other.actor) +
                           " " + did + " with no " + missing + " between");
}

void SharedMemory::check_write_happens_before(const Word& word, const char* does,
                                              const Access& access, const Observer& observer,
                                              SharedAddress address) const {
    const Access& write = word.write;
    if (word.in_flight)
        fail(access.actor,
             "touches what " + text(write.actor) + " is still copying: " +
                 (order_.is_thread(write.agent)
                      ? "thread " + std::to_string(write.agent) + " has not waited for it"
                      : "its mbarrier does not count it yet"));
    if (!order_.happens_before(write, observer))
        report_race(access, observer, does, address, write, "wrote");
}

void SharedMemory::check_reads_happen_before(const Word& word, const Access& access,
                                             const Observer& observer,
                                             SharedAddress address) const {
    if (!order_.happens_before(word.first_read, observer))
        report_race(access, observer, "writes", address, word.first_read, "read");
    for (const Access& read : word.other_reads)
        if (!order_.happens_before(read, observer))
            report_race(access, observer, "writes", address, read, "read");
}

void SharedMemory::add_read(Word& word, const Access& access) const {
    if (order_.is_settled(word.first_read)) {
        word.first_read = access;
        word.other_reads.clear();  // they are settled too
    } else if (word.first_read.agent == access.agent) {
        word.first_read = access;
    } else {
        add_other_read(word, access);
    }
}

void SharedMemory::add_other_read(Word& word, const Access& access) const {
    std::vector<Access>& reads = word.other_reads;
    const auto place =
        std::lower_bound(reads.begin(), reads.end(), access.agent,
                         [](const Access& read, int agent) { return read.agent < agent; });
    if (place != reads.end() && place->agent == access.agent)
        *place = access;
    else
        reads.insert(place, access);
}

const std::byte* SharedMemory::read(const Access& access, const Observer& observer,
                                    SharedAddress address, int bytes, int alignment) {
    Word* words = words_at(access.actor, address, bytes, alignment);
    for (int i = 0; i < bytes / kWordBytes; ++i) {
        check_write_happens_before(words[i], "reads", access, observer, address);
        add_read(words[i], access);
    }
    return at(address);
}

std::byte* SharedMemory::write(const Access& access, const Observer& observer,
                               SharedAddress address, int bytes, int alignment) {
    Word* words = words_at(access.actor, address, bytes, alignment);
    for (int i = 0; i < bytes / kWordBytes; ++i) {
        check_write_happens_before(words[i], "writes", access, observer, address);
        check_reads_happen_before(words[i], access, observer, address);
        words[i].first_read = {};
        words[i].other_reads.clear();
        words[i].write = access;
    }
    return &bytes_[address - kStart];
}

const std::byte* SharedMemory::read(const Actor& actor, SharedAddress address, int bytes) {
    return read(order_.access(actor), order_.observer(actor), address, bytes, bytes);
}

std::byte* SharedMemory::write(const Actor& actor, SharedAddress address, int bytes) {
    return write(order_.access(actor), order_.observer(actor), address, bytes, bytes);
}

void SharedMemory::start_copy(const Actor& actor, SharedAddress address) {
    start_copy(order_.access(actor), order_.observer(actor), address);
}

void SharedMemory::start_copy(const Access& access, const Observer& observer,
                              SharedAddress address) {
    write(access, observer, address, kCopyBytes, kCopyBytes);
    Word* words = words_at(access.actor, address, kCopyBytes, kCopyBytes);
    for (int i = 0; i < kCopyBytes / kWordBytes; ++i) words[i].in_flight = true;
}

std::byte* SharedMemory::finish_copy(SharedAddress address) {
    const Access& write = words_[(address - kStart) / kWordBytes].write;
    return finish_copy(address, order_.access(write.actor).count);
}

std::byte* SharedMemory::finish_copy(SharedAddress address, uint32_t count) {
    Word* words = &words_[(address - kStart) / kWordBytes];
    for (int i = 0; i < kCopyBytes / kWordBytes; ++i) {
        Access& write = words[i].write;
        write = order_.access(write.actor, write.agent, count);
        words[i].in_flight = false;
    }
    return &bytes_[address - kStart];
}

}  // namespace jvp_attn::emulator
