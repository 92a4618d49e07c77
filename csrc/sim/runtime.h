// The simulator's own state, shared by the parts of runtime.cpp. Kernels see sim.h only.
#pragma once

#include <cstdarg>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "fiber.h"
#include "shadow.h"
#include "sim.h"

namespace sim {

// Shared memory, and what an asynchronous copy is still to fill, hold this word: a NaN as float, as double and as bfloat16.
constexpr uint32_t kPoison = 0xfff4fff4u;
constexpr int kWarp = 32;

enum class Schedule { forward, reverse, random, warp_by_warp };

struct Settings {
    Schedule schedule = Schedule::forward;
    uint64_t seed = 0;
    bool late_copies = true;  // asynchronous copies happen when they are waited for, else when they are issued
    int architecture = 80;    // whose limits hold
    bool record = false;      // keep the addresses of accesses
};

struct Copy {
    void* dst;
    const void* src;  // null: zeros
    size_t bytes;
    unsigned group;
    const void* pc;  // where it was issued
};

enum class State { ready, at_barrier, in_collective, gone };

struct Thread {
    Fiber fiber;
    uint3 index{};
    int id = 0, warp = 0, lane = 0;
    State state = State::gone;
    At at{};                // where it waits
    unsigned mask = 0;      // the lanes it waits for
    void* operand = nullptr;
    unsigned barriers = 0;  // passed in this block
    std::vector<Copy> copies;  // asynchronous ones on their way, in order of issue
    unsigned group = 0;        // the one that is open
    // Order inside the warp: this thread's count of warp synchronisations, and what it is ordered after of its fellow lanes'.
    uint32_t clock = 1;
    uint32_t known[kWarp]{};
#ifdef TINYDIFF_SIM_TSAN
    std::map<unsigned, unsigned> warp_syncs;  // by mask
#endif
};

struct Launch {
    const char* kernel = "";
    At at{};
    dim3 grid, block;
    size_t shared_bytes = 0;
    void (*call)(void*) = nullptr;
    void* body = nullptr;
    int threads = 0;
    uint32_t number = 0;  // counts launches
};

struct Allocation {
    char* base;
    size_t bytes;
    size_t unit;  // bytes that have one writer
    bool writable;
    size_t guard;  // bytes on either side that belong to nobody
    std::string name;
    std::vector<uint64_t> writer;  // launch << 32 | block + 1
    std::unique_ptr<Shadow> shadow;
};

extern Settings settings;
extern Launch launch;
extern bool running;            // a kernel is being run
extern uint32_t block_number;   // of the block that is being run
extern Thread* current;
extern std::vector<std::unique_ptr<Thread>> threads;
extern char* shared_base;

uint64_t random_bits();

// block.cpp
void yield();  // lets another thread run until this one is ready again
void make_ready(Thread& thread);

// memory.cpp
Allocation* find_allocation(const void* p, size_t bytes);
bool in_guard(const void* p, size_t bytes);
void check_global(const void* p, size_t bytes, Access access, At at);
void check_shared(const void* p, size_t bytes, Access access, At at);
std::string describe_place(const void* p, size_t bytes);
bool in_shared(const void* p, size_t bytes);
void begin_shared();
void end_shared();
void poison(void* p, size_t bytes);
void finish_copies(Thread& thread);

// report.cpp
[[noreturn]] void fail(const char* kind, At at, const char* format, ...) __attribute__((format(printf, 3, 4)));
void note(const char* kind, At at, const std::string& message, const void* other_pc = nullptr);
std::string name_thread(const Thread& thread);
std::string name_place(At at);  // "file:line"
std::string print(const char* format, ...) __attribute__((format(printf, 1, 2)));
bool anything_found();
void record(const void* p, size_t bytes, Access access, At at, const void* pc);  // at: of a call of ours; pc: of the kernel

// race.cpp
extern bool instrumented;  // the kernels were compiled so that every access of theirs is seen
void begin_race_launch();
void begin_race_block();
void next_interval();
void order_lanes(Thread* const* lanes);
void see(const void* p, size_t bytes, Access access, const void* pc);
void see_copy(void* dst, size_t bytes, bool begins, const void* pc);

}  // namespace sim
