#include "async_copies.h"

#include <cstring>
#include <string>

namespace jvp_attn::emulator {

namespace {

constexpr int kCopyBytes = 16;

}  // namespace

void AsyncCopies::issue(const Actor& actor, SharedAddress target, const void* source, int bytes,
                        SharedMemory& shared, const GlobalMemory& global) {
    if (bytes < 0 || bytes > kCopyBytes)
        fail(actor, "copies " + std::to_string(bytes) + " bytes; it can be 0 to 16");
    global.check_read(actor, source, bytes, kCopyBytes);
    shared.start_copy(actor, target);
    copies_.push_back({target, source, bytes, open_group_, actor.where});
}

void AsyncCopies::wait(int pending, SharedMemory& shared) {
    auto copy = copies_.begin();
    for (; copy != copies_.end() && copy->group < open_group_ - pending; ++copy) {
        std::byte* target = shared.finish_copy(copy->target);
        if (copy->bytes > 0) std::memcpy(target, copy->source, copy->bytes);
        std::memset(target + copy->bytes, 0, kCopyBytes - copy->bytes);
    }
    copies_.erase(copies_.begin(), copy);
}

void AsyncCopies::forget_all() {
    copies_.clear();
    open_group_ = 0;
}

void AsyncCopies::check_finished(int thread) const {
    if (!copies_.empty())
        fail({thread, "copy_async", copies_.front().where},
             "the thread ends while " + std::to_string(copies_.size()) +
                 " of its copies are in flight: it has not waited for them");
}

}  // namespace jvp_attn::emulator
