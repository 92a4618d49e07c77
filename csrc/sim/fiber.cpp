#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

namespace sim {

#ifdef __x86_64__
// Saves the registers a call must keep on the old stack, and takes them from the new one.
extern "C" void tinydiff_sim_switch(void** save, void* load);
asm(R"(
.text
.hidden tinydiff_sim_switch
.globl tinydiff_sim_switch
.type tinydiff_sim_switch, @function
tinydiff_sim_switch:
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
.size tinydiff_sim_switch, .-tinydiff_sim_switch
)");
#endif

constexpr size_t kStack = 256 * 1024;  // address space; pages are taken as they are touched

Fiber::~Fiber() {
    sanitizer_.destroy();
    if (stack_) munmap(static_cast<char*>(stack_) - getpagesize(), size_ + getpagesize());
}

void Fiber::create(void (*entry)()) {
    if (!stack_) {
        const size_t guard = getpagesize();  // running over the end of the stack faults
        void* base = mmap(nullptr, kStack + guard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (base == MAP_FAILED) throw std::bad_alloc();
        mprotect(base, guard, PROT_NONE);
        stack_ = static_cast<char*>(base) + guard;
        size_ = kStack;
    }
    sanitizer_.create(stack_, size_);
#ifdef __x86_64__
    auto** top = reinterpret_cast<void**>(static_cast<char*>(stack_) + size_);
    *--top = nullptr;  // where entry would return to: it never does; keeps the alignment of a call
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    pointer_ = top;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_;
    context_.uc_stack.ss_size = size_;
    makecontext(&context_, entry, 0);
#endif
}

void Fiber::change(Fiber& from, Fiber& to) {
    SanitizerFiber::leave(from.sanitizer_, to.sanitizer_);
#ifdef __x86_64__
    tinydiff_sim_switch(&from.pointer_, to.pointer_);
#else
    swapcontext(&from.context_, &to.context_);
#endif
    SanitizerFiber::enter(&from.sanitizer_);
}

void Fiber::arrived() { SanitizerFiber::enter(nullptr); }

}  // namespace sim
