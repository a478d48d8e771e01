// The registers of a block, which its warps share (setmaxnreg).
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "report.h"
#include "scheduler.h"
#include "waiting.h"

namespace jvp_attn::emulator {

class RegisterPool : public Awaited {
public:
    // One block fills the multiprocessor: the compiler gives its threads all that there is.
    void start_block(int threads);

    // A warp asks for so many registers a thread, more or fewer than before.
    void ask(const Actor& actor, int registers, bool more);
    // Whether it has them now. All threads of the warp ask until it has.
    bool has_got(int warp);

    std::string state() const override;

private:
    struct Warp {
        int registers;
        std::vector<int> asked;  // so far
    };

    int free_ = 0;  // in warps: 32 times as many
    std::array<Warp, kMaxWarps> warps_;
};

}  // namespace jvp_attn::emulator
