// The reports of broken rules: texts, and the exception that ends a launch.
#pragma once

#include <cstdint>
#include <functional>
#include <source_location>
#include <stdexcept>
#include <string>

namespace jvp_attn::emulator {

using Place = std::source_location;

// Ends the launch; what() names the block, the thread and the line of the kernel.
struct KernelError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// A thread, and the instruction that it executes.
struct Actor {
    int thread;  // in its block
    const char* instruction;
    Place where;
};

// "csrc/sm80/forward.cuh:120"
std::string text(const Place& place);

// "thread 3's shared_store_float (csrc/sm80/forward.cuh:120)"
std::string text(const Actor& actor);

// "threads 0-15, 17": those among the first `count` for which `included` is true
std::string list_of_threads(int count, const std::function<bool(int)>& included);

// "block 2, thread 3, shared_store_float (csrc/sm80/forward.cuh:120): <message>"
[[noreturn]] void fail(const Actor& actor, const std::string& message);

}  // namespace jvp_attn::emulator
