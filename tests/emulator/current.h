// Which thread of which block is running. There is one emulated machine, and it runs one at a time.
#pragma once

#include "report.h"

namespace jvp_attn::emulator {

struct Current {
    int block = 0;
    int thread = 0;
};

inline Current current;

// The running thread, at an instruction.
inline Actor self(const char* instruction, const Place& where) {
    return {current.thread, instruction, where};
}

}  // namespace jvp_attn::emulator
