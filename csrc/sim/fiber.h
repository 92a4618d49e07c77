// A fiber: a stack of its own that is entered and left by hand. On x86-64 a switch is a dozen instructions; elsewhere it is
// ucontext's, which costs a system call. The sanitizers are told of every switch.
#pragma once

#include <cstddef>

#include "tools.h"

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace sim {

class Fiber {
  public:
    Fiber() = default;  // the thread that is running now; create() makes one with a stack
    Fiber(const Fiber&) = delete;
    ~Fiber();

    void create(void (*entry)());  // again on a fiber that has one: starts over on the same stack
    static void change(Fiber& from, Fiber& to);
    bool owns(const void* p) const { return p >= stack_ && p < static_cast<const char*>(stack_) + size_; }
    static void arrived();  // first thing on a fiber that is entered for the first time

  private:
    void* stack_ = nullptr;
    size_t size_ = 0;
#ifdef __x86_64__
    void* pointer_ = nullptr;
#else
    ucontext_t context_{};
#endif
    SanitizerFiber sanitizer_;
};

}  // namespace sim
