// The thread that runs now. There is one emulated GPU, and it runs one thread at a time.
#pragma once

#include "report.h"

namespace jvp_attn::emulator {

struct Current {
    int block = 0;
    int thread = 0;
};

inline Current current;

// The running thread, and the instruction that it executes.
inline Actor self(const char* instruction, const Place& where) {
    return {current.thread, instruction, where};
}

}  // namespace jvp_attn::emulator
