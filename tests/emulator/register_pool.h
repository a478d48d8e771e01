// The registers of a block, which its warps share (setmaxnreg).
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "report.h"
#include "scheduler.h"
#include "waitable.h"

namespace jvp_attn::emulator {

class RegisterPool : public Waitable {
public:
    // One block fills the multiprocessor, and its threads start with all registers.
    void start_block(int threads);

    // A warp requests a number of registers for each thread, more or fewer than it has.
    void request(const Actor& actor, int registers, bool more);
    // Whether the warp has them now. Its threads repeat this until it has.
    bool try_acquire(int warp);

    std::string state() const override;

private:
    struct Warp {
        int registers;
        std::vector<int> requests;  // all so far
    };

    int free_ = 0;  // for each thread of one warp
    std::array<Warp, kMaxWarps> warps_;
};

}  // namespace jvp_attn::emulator
