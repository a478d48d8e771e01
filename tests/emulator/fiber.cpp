// Fibers on stacks from mmap, switched in assembly or, elsewhere, by swapcontext.
#include "fiber.h"

#include <pthread.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <new>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace jvp_attn::emulator {

namespace {

#ifdef __SANITIZE_ADDRESS__
constexpr std::size_t kStackBytes = 1024 * 1024;
#else
constexpr std::size_t kStackBytes = 256 * 1024;
#endif
constexpr std::size_t kGuardBytes = 4096;  // below a stack; an overflow crashes there

Fiber* entered = nullptr;  // the fiber that was last switched to

}  // namespace

#ifndef JVP_ATTN_UCONTEXT
// Saves the registers that a call preserves on this stack and the stack pointer in *save, then
// takes the other stack and restores its registers.
extern "C" void jvp_attn_switch_stack(void** save, void* stack_pointer);
asm(R"(
    .text
    .hidden jvp_attn_switch_stack
    .globl jvp_attn_switch_stack
    .type jvp_attn_switch_stack, @function
jvp_attn_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size jvp_attn_switch_stack, . - jvp_attn_switch_stack
)");
#endif

Fiber::Fiber() {
#ifdef __SANITIZE_ADDRESS__
    pthread_attr_t attributes;
    void* stack = nullptr;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &stack, &stack_bytes_);
    pthread_attr_destroy(&attributes);
    stack_ = static_cast<std::byte*>(stack);
#endif
}

Fiber::Fiber(int number) : stack_bytes_(kStackBytes), owns_stack_(true) {
    void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, kGuardBytes, PROT_NONE);
    stack_ = static_cast<std::byte*>(memory) + kGuardBytes;
    offset_of_top_ = kStackBytes - number % 64 * 1088;
}

Fiber::~Fiber() {
    if (owns_stack_) munmap(stack_ - kGuardBytes, kGuardBytes + stack_bytes_);
}

void Fiber::start(void (*body)()) {
    body_ = body;
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(stack_, stack_bytes_);
    shadow_stack_ = nullptr;
#endif
#ifdef JVP_ATTN_UCONTEXT
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_;
    context_.uc_stack.ss_size = offset_of_top_;
    context_.uc_link = nullptr;
    makecontext(&context_, &Fiber::enter, 0);
#else
    // What jvp_attn_switch_stack expects: six registers, then where to return to. `enter` finds the
    // stack as after a call, with a return address, here none, at a multiple of 16 less 8.
    auto* top = reinterpret_cast<std::uintptr_t*>(stack_ + offset_of_top_);
    *--top = 0;
    *--top = reinterpret_cast<std::uintptr_t>(&Fiber::enter);
    for (int i = 0; i < 6; ++i) *--top = 0;
    stack_pointer_ = top;
#endif
}

void Fiber::switch_to(Fiber& next) {
    entered = &next;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&shadow_stack_, next.stack_, next.stack_bytes_);
#endif
#ifdef JVP_ATTN_UCONTEXT
    swapcontext(&context_, &next.context_);
#else
    jvp_attn_switch_stack(&stack_pointer_, next.stack_pointer_);
#endif
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(shadow_stack_, nullptr, nullptr);
#endif
}

void Fiber::enter() {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
    entered->body_();
    std::abort();  // there is nothing to return to
}

}  // namespace jvp_attn::emulator
