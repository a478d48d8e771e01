#include "register_pool.h"

#include <algorithm>
#include <string>

namespace jvp_attn::emulator {

namespace {

constexpr int kRegisters = 1 << 16;  // of a multiprocessor
constexpr int kUnit = 8;             // of allocation
constexpr int kFewest = 24;
constexpr int kMost = 256;
constexpr int kWarpsOfWarpgroup = 4;

}  // namespace

void RegisterPool::start_block(int threads) {
    free_ = 0;
    waiting.clear();
    warps_.fill({std::min(kRegisters / threads / kUnit * kUnit, kMost), {}});
}

void RegisterPool::request(const Actor& actor, int registers, bool more) {
    if (registers % kUnit != 0 || registers < kFewest || registers > kMost)
        fail(actor, std::to_string(registers) + " registers; it can be a multiple of 8 from 24 " +
                        "to 256");
    const int number = actor.thread / kWarpThreads;
    Warp& warp = warps_[number];
    if (more ? registers < warp.registers : registers > warp.registers)
        fail(actor, std::to_string(registers) + " registers are " + (more ? "fewer" : "more") +
                        " than the " + std::to_string(warp.registers) + " that the thread has");

    const std::size_t turn = warp.requests.size();
    const int first = number / kWarpsOfWarpgroup * kWarpsOfWarpgroup;
    for (int other = first; other < first + kWarpsOfWarpgroup; ++other)
        if (warps_[other].requests.size() > turn && warps_[other].requests[turn] != registers)
            fail(actor, std::to_string(registers) + " registers, but warp " +
                            std::to_string(other) + " of the warpgroup has requested " +
                            std::to_string(warps_[other].requests[turn]));
    warp.requests.push_back(registers);
}

bool RegisterPool::try_acquire(int number) {
    Warp& warp = warps_[number];
    const int more = warp.requests.back() - warp.registers;
    if (more > free_) return false;
    free_ -= more;
    warp.registers += more;
    return true;
}

std::string RegisterPool::state() const {
    return "registers: " + std::to_string(free_) + " for each thread of a warp are free";
}

}  // namespace jvp_attn::emulator
