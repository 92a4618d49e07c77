// The race check: two accesses to one byte, at least one of them a write, by two threads that nothing has ordered.
//
// Kernels are compiled with -fsanitize=thread and linked with the functions below instead of ThreadSanitizer's library, so every
// plain access of theirs arrives here; what goes through sim.h arrives by see(). Order is known exactly, whatever the schedule:
// barriers order a block's threads (every barrier begins a new interval), WARP_SYNC orders the lanes it names (each thread
// knows up to which of their own counts it is ordered after its fellow lanes), and nothing orders blocks. Shuffles exchange
// values but order no memory, as in CUDA.
#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <unordered_set>

#include "runtime.h"
#include "shadow.h"

namespace sim {

bool instrumented = false;
static uint32_t interval = 0, launch_interval = 0, block_interval = 0;
static std::vector<Word> shared_words;

void begin_race_launch() { launch_interval = ++interval; }

void begin_race_block() {
    block_interval = ++interval;
    if (instrumented && shared_words.size() < launch.shared_bytes / 4 + 1) shared_words.resize(launch.shared_bytes / 4 + 1);
}

void next_interval() { ++interval; }

void order_lanes(Thread* const* lanes) {
    if (!instrumented) return;
    uint32_t known[kWarp]{};
    for (int lane = 0; lane < kWarp; ++lane) {
        if (!lanes[lane]) continue;
        lanes[lane]->known[lane] = lanes[lane]->clock++;
        for (int l = 0; l < kWarp; ++l) known[l] = std::max(known[l], lanes[lane]->known[l]);
    }
    for (int lane = 0; lane < kWarp; ++lane)
        if (lanes[lane]) std::copy(known, known + kWarp, lanes[lane]->known);
}

static int32_t pack_pc(const void* pc) {
    return static_cast<int32_t>(reinterpret_cast<intptr_t>(pc) - reinterpret_cast<intptr_t>(&order_lanes));
}
static const void* unpack_pc(int32_t pc) { return reinterpret_cast<const void*>(reinterpret_cast<intptr_t>(&order_lanes) + pc); }

static const char* did(uint8_t access) {
    return Access(access) == Access::read ? "read" : Access(access) == Access::write ? "written" : "added to";
}
static const char* does(Access access) {
    return access == Access::read ? "reads" : access == Access::write ? "writes" : "adds to";
}

// Is what was seen ordered before what this thread does now?
static bool ordered(const Seen& seen, const Thread& me) {
    if (seen.interval < launch_interval) return true;
    if (seen.interval < block_interval) return false;  // another block
    if (seen.thread == me.id || seen.interval < interval) return true;
    return seen.thread / kWarp == me.warp && seen.clock <= me.known[seen.thread % kWarp];
}

static void see_word(Word& word, uint8_t bytes, Access access, const void* pc, const void* p) {
    const Thread& me = *current;
    const bool reads = access == Access::read;
    Seen* free = nullptr;
    for (Seen& seen : word.seen) {
        if (!seen.interval) {
            if (!free) free = &seen;
            continue;
        }
        const bool before = ordered(seen, me);
        const bool harmless = (reads && Access(seen.access) == Access::read) ||
                              (access == Access::atomic && Access(seen.access) == Access::atomic);
        if (!before && !harmless && seen.bytes & bytes) {
            const bool other_block = seen.interval < block_interval;
            note("race", {nullptr, 0, pc},
                 print("%s %s %s, which thread %d%s has %s, and nothing orders the two", name_thread(me).c_str(), does(access),
                       describe_place(p, 1).c_str(), seen.thread, other_block ? " of another block" : "", did(seen.access)),
                 unpack_pc(seen.pc));
        }
        // What came before and touches no other bytes has nothing more to tell than the access that now takes its place.
        if (before && !(seen.bytes & ~bytes) && (!reads || Access(seen.access) == Access::read || seen.interval < interval)) {
            if (free) seen.interval = 0;
            if (!free) free = &seen;
        }
    }
    if (!free) free = &word.seen[random_bits() % 4];
    *free = {interval, me.clock, pack_pc(pc), static_cast<uint16_t>(me.id), bytes, static_cast<uint8_t>(access)};
}

template <class F>
static void each_word(Word* words, size_t offset, size_t bytes, F f) {
    for (size_t first = offset, last = offset + bytes; first < last;) {
        const size_t word = first / 4, end = std::min(last, word * 4 + 4);
        f(words[word], static_cast<uint8_t>((1u << (end - word * 4)) - (1u << (first - word * 4))));
        first = end;
    }
}

static void freshen(Word& word) {  // shared memory begins each block with no value
    if (word.interval < block_interval) {
        word = Word();
        word.interval = block_interval;
    }
}

static void see_shared(const void* p, size_t bytes, Access access, const void* pc) {
    const char* const first = static_cast<const char*>(p);
    each_word(shared_words.data(), first - shared_base, bytes, [&](Word& word, uint8_t mask) {
        freshen(word);
        if (word.in_flight & mask)
            note("async", {nullptr, 0, pc},
                 print("%s %s %s while an asynchronous copy to it has not been waited for", name_thread(*current).c_str(),
                       does(access), describe_place(p, bytes).c_str()));
        else if (access != Access::write && mask & ~word.written)
            note("uninitialised", {nullptr, 0, pc},
                 print("%s reads %s, which nobody has written in this block", name_thread(*current).c_str(),
                       describe_place(p, bytes).c_str()));
        if (access != Access::read) word.written |= mask;
        see_word(word, mask, access, pc, p);
    });
}

void see(const void* p, size_t bytes, Access access, const void* pc) {
    if (!instrumented || !running) return;
    if (in_shared(p, bytes)) return see_shared(p, bytes, access, pc);
    Allocation* a = find_allocation(p, bytes);
    if (!a) return;
    if (!a->shadow) a->shadow = std::make_unique<Shadow>(a->bytes);
    each_word(a->shadow->words.data(), static_cast<const char*>(p) - a->base, bytes,
              [&](Word& word, uint8_t mask) { see_word(word, mask, access, pc, p); });
}

void see_copy(void* dst, size_t bytes, bool begins, const void* pc) {
    if (!instrumented) return;
    if (begins) see_shared(dst, bytes, Access::write, pc);
    each_word(shared_words.data(), static_cast<char*>(dst) - shared_base, bytes, [&](Word& word, uint8_t mask) {
        word.in_flight = begins ? word.in_flight | mask : word.in_flight & ~mask;
    });
    if (!begins) see_shared(dst, bytes, Access::write, pc);
}

// Whether there is memory at all: a wild index must end in a finding, not in a crash.
static bool mapped(const void* p) {
    constexpr uintptr_t kPage = 4096;
    static std::unordered_set<uintptr_t> known;
    const uintptr_t page = reinterpret_cast<uintptr_t>(p) & ~(kPage - 1);
    if (known.count(page)) return true;
    if (msync(reinterpret_cast<void*>(page), kPage, MS_ASYNC) && errno == ENOMEM) return false;  // does nothing else
    return known.insert(page).second;
}

// An access that the compiler reports: to shared memory, to an array, or to what is none of our business (stacks, constants).
static void plain(const void* p, size_t bytes, Access access, const void* pc) {
    if (!running || !current || current->fiber.owns(p)) return;
    if (in_shared(p, bytes)) {
        record(p, bytes, access, {nullptr, 0}, pc);
        see_shared(p, bytes, access, pc);
    } else if (find_allocation(p, bytes)) {
        check_global(p, bytes, access, {nullptr, 0, pc});
        record(p, bytes, access, {nullptr, 0}, pc);
        see(p, bytes, access, pc);
    } else if (in_guard(p, bytes) || !mapped(p)) {
        fail("bounds", {nullptr, 0, pc}, "%s %s %zu bytes at %s", name_thread(*current).c_str(), does(access), bytes,
             describe_place(p, bytes).c_str());
    }
}

}  // namespace sim

#ifndef TINYDIFF_SIM_TSAN
#define PC __builtin_return_address(0)
#define ACCESSES(bytes)                                                                                   \
    void __tsan_read##bytes(void* p) { sim::plain(p, bytes, sim::Access::read, PC); }                     \
    void __tsan_write##bytes(void* p) { sim::plain(p, bytes, sim::Access::write, PC); }                   \
    void __tsan_unaligned_read##bytes(void* p) { sim::plain(p, bytes, sim::Access::read, PC); }           \
    void __tsan_unaligned_write##bytes(void* p) { sim::plain(p, bytes, sim::Access::write, PC); }
extern "C" {
void __tsan_init() { sim::instrumented = true; }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
void __tsan_read_range(void* p, unsigned long bytes) { sim::plain(p, bytes, sim::Access::read, PC); }
void __tsan_write_range(void* p, unsigned long bytes) { sim::plain(p, bytes, sim::Access::write, PC); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
#endif
