// What the sanitizers must be told: ThreadSanitizer of fibers and of who waits for whom, AddressSanitizer of stacks.
//
// ThreadSanitizer must see no order between threads but that of barriers: fibers are switched without synchronisation (flag 1),
// this runtime is compiled without instrumentation, and a barrier uses two objects in turn, because with one a thread that
// runs ahead would hand its next phase's release to those still leaving this one, and hide a write after a read.
#pragma once

#include <cstddef>

#ifdef TINYDIFF_SIM_TSAN
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* object);
void __tsan_release(void* object);
void __tsan_read1_pc(void* p, void* pc);
void __tsan_read2_pc(void* p, void* pc);
void __tsan_read4_pc(void* p, void* pc);
void __tsan_read8_pc(void* p, void* pc);
void __tsan_read16_pc(void* p, void* pc);
void __tsan_write1_pc(void* p, void* pc);
void __tsan_write2_pc(void* p, void* pc);
void __tsan_write4_pc(void* p, void* pc);
void __tsan_write8_pc(void* p, void* pc);
void __tsan_write16_pc(void* p, void* pc);
}
#endif
#ifdef TINYDIFF_SIM_ASAN
extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
void __asan_unpoison_memory_region(const volatile void* p, size_t size);
}
#endif

namespace sim {

#ifdef TINYDIFF_SIM_TSAN
struct SanitizerFiber {
    void* fiber = nullptr;
    bool created = false;  // else it is the thread's own
    void create(void*, size_t) {
        destroy();
        fiber = __tsan_create_fiber(0);
        created = true;
    }
    void destroy() {
        if (created) __tsan_destroy_fiber(fiber);
    }
    static void leave(SanitizerFiber& from, SanitizerFiber& to) {
        if (!from.fiber) from.fiber = __tsan_get_current_fiber();
        __tsan_switch_to_fiber(to.fiber, 1);
    }
    static void enter(SanitizerFiber*) {}
};
inline void acquire(void* object) { __tsan_acquire(object); }
inline void release(void* object) { __tsan_release(object); }
// An access that this runtime makes for the kernel's code at pc.
inline void tell_read(const void* p, size_t bytes, const void* pc) {
    void *a = const_cast<void*>(p), *c = const_cast<void*>(pc);
    bytes == 16 ? __tsan_read16_pc(a, c) : bytes == 8 ? __tsan_read8_pc(a, c) : bytes == 4 ? __tsan_read4_pc(a, c)
    : bytes == 2 ? __tsan_read2_pc(a, c) : __tsan_read1_pc(a, c);
}
inline void tell_write(void* p, size_t bytes, const void* pc) {
    void* c = const_cast<void*>(pc);
    bytes == 16 ? __tsan_write16_pc(p, c) : bytes == 8 ? __tsan_write8_pc(p, c) : bytes == 4 ? __tsan_write4_pc(p, c)
    : bytes == 2 ? __tsan_write2_pc(p, c) : __tsan_write1_pc(p, c);
}
#else
#ifdef TINYDIFF_SIM_ASAN
struct SanitizerFiber {
    const void* bottom = nullptr;
    size_t size = 0;
    void* fake_stack = nullptr;
    inline static SanitizerFiber* left = nullptr;
    void create(void* stack, size_t bytes) {
        __asan_unpoison_memory_region(stack, bytes);  // frames of an abandoned run
        bottom = stack;
        size = bytes;
        fake_stack = nullptr;
    }
    void destroy() {}
    static void leave(SanitizerFiber& from, SanitizerFiber& to) {
        left = &from;
        __sanitizer_start_switch_fiber(&from.fake_stack, to.bottom, to.size);
    }
    static void enter(SanitizerFiber* me) {
        const void* bottom = nullptr;
        size_t size = 0;
        __sanitizer_finish_switch_fiber(me ? me->fake_stack : nullptr, &bottom, &size);
        if (!left->bottom) {  // the first switch of all tells where the caller's own stack lies
            left->bottom = bottom;
            left->size = size;
        }
    }
};
#else
struct SanitizerFiber {
    void create(void*, size_t) {}
    void destroy() {}
    static void leave(SanitizerFiber&, SanitizerFiber&) {}
    static void enter(SanitizerFiber*) {}
};
#endif
inline void acquire(void*) {}
inline void release(void*) {}
inline void tell_read(const void*, size_t, const void*) {}
inline void tell_write(void*, size_t, const void*) {}
#endif

}  // namespace sim
