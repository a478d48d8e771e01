// Which thread of which block is running. There is one emulated machine, and it runs one at a time.
#pragma once

namespace jvp_attn::emulator {

struct Current {
    int block = 0;
    int thread = 0;
};

inline Current current;

}  // namespace jvp_attn::emulator
