// A fiber: a thread of execution with a stack of its own, switched to in a few nanoseconds.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) && !defined(JVP_ATTN_UCONTEXT)
#define JVP_ATTN_UCONTEXT  // slower, but available on every Unix
#endif

#ifdef JVP_ATTN_UCONTEXT
#include <ucontext.h>
#endif

namespace jvp_attn::emulator {

class Fiber {
public:
    // The stack that is in use already, so that others can switch back to it.
    Fiber();
    // A new stack. Its top is offset by the number, so that the tops of many stacks do not evict
    // one another from the cache.
    explicit Fiber(int number);
    ~Fiber();
    Fiber(const Fiber&) = delete;
    Fiber& operator=(const Fiber&) = delete;

    // The next switch to this fiber calls the body on an empty stack. The former stack is discarded
    // without unwinding. The body must not return.
    void start(void (*body)());

    // Runs the other fiber. Returns when some fiber switches back to this one.
    void switch_to(Fiber& next);

private:
    static void enter();

    std::byte* stack_ = nullptr;
    std::size_t stack_bytes_ = 0;
    std::size_t offset_of_top_ = 0;
    void (*body_)() = nullptr;
    void* shadow_stack_ = nullptr;  // AddressSanitizer's
    bool owns_stack_ = false;
#ifdef JVP_ATTN_UCONTEXT
    ucontext_t context_;
#else
    void* stack_pointer_ = nullptr;
#endif
};

}  // namespace jvp_attn::emulator
