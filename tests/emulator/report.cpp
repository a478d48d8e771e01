#include "report.h"

#include "current.h"

namespace jvp_attn::emulator {

std::string text(const Place& place) {
    return std::string(place.file_name()) + ":" + std::to_string(place.line());
}

std::string text(const Actor& actor) {
    return "thread " + std::to_string(actor.thread) + "'s " + actor.instruction + " (" +
           text(actor.where) + ")";
}

std::string list_of_threads(int count, const std::function<bool(int)>& included) {
    std::string list;
    int listed = 0;
    for (int first = 0; first < count; ++first) {
        if (!included(first)) continue;
        int last = first;
        while (last + 1 < count && included(last + 1)) ++last;
        list += (list.empty() ? "" : ", ") + std::to_string(first);
        if (last > first) list += "-" + std::to_string(last);
        listed += last - first + 1;
        first = last;
    }
    return (listed == 1 ? "thread " : "threads ") + list;
}

void fail(const Actor& actor, const std::string& message) {
    throw KernelError("block " + std::to_string(current.block) + ", thread " +
                      std::to_string(actor.thread) + ", " + actor.instruction + " (" +
                      text(actor.where) + "): " + message);
}

}  // namespace jvp_attn::emulator
