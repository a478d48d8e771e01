// A fiber: a stack of its own that the processor can be switched to, in a few nanoseconds.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) && !defined(JVP_ATTN_UCONTEXT)
#define JVP_ATTN_UCONTEXT  // slower, but known to every Unix
#endif

#ifdef JVP_ATTN_UCONTEXT
#include <ucontext.h>
#endif

namespace jvp_attn::emulator {

class Fiber {
public:
    // Stands for the stack that is in use already: one can switch away from it and back.
    Fiber();
    // With a stack of its own. Which of its cache lines come first depends on the number, lest the
    // tops of many stacks, all aligned alike, push one another out of the cache.
    explicit Fiber(int number);
    ~Fiber();
    Fiber(const Fiber&) = delete;
    Fiber& operator=(const Fiber&) = delete;

    // The next switch to this fiber calls the body on an empty stack. What the fiber did before is
    // forgotten, not unwound. The body must not return.
    void start(void (*body)());

    // Goes on with the other fiber. Returns when some fiber switches back to this one.
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
