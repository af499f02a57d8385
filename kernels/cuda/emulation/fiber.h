// A stack and a place in the code: what a thread of a CUDA block is here. On x86-64 switching is a dozen instructions;
// elsewhere POSIX contexts do the same, slowly.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) || defined(CTQ_PORTABLE_FIBERS)
#include <ucontext.h>
#endif

namespace simt {

#if defined(__x86_64__) && !defined(CTQ_PORTABLE_FIBERS)

struct Fiber {
    void* stack_pointer = nullptr;
};

// Saves the callee-saved registers on the stack and takes those of the next (System V). Weak: each file that is compiled
// has it.
extern "C" void ctq_switch_stack(void** save, void* next);
asm(".text\n"
    ".weak ctq_switch_stack\n"
    "ctq_switch_stack:\n"
    "push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
    "mov %rsp, (%rdi)\n mov %rsi, %rsp\n"
    "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n"
    "ret\n");

// The next switch to `fiber` calls `first`, which must not return.
inline void prepare(Fiber& fiber, unsigned char* stack, size_t bytes, void (*first)()) {
    void** top = (void**)(stack + bytes);
    *--top = nullptr;  // keeps the stack aligned as after a call
    *--top = (void*)first;
    for (int saved = 0; saved < 6; saved++) *--top = nullptr;
    fiber.stack_pointer = top;
}

inline void change(Fiber& from, Fiber& to) { ctq_switch_stack(&from.stack_pointer, to.stack_pointer); }

#else

struct Fiber {
    ucontext_t context;
};

inline void prepare(Fiber& fiber, unsigned char* stack, size_t bytes, void (*first)()) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stack;
    fiber.context.uc_stack.ss_size = bytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, first, 0);
}

inline void change(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }

#endif

}  // namespace simt
