// Launches, blocks, and who runs next: threads run until they wait, and the schedule picks among those that need not.
#include <algorithm>
#include <numeric>
#include <random>

#include "runtime.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace sim {

int mutant = 0;
long mutant_hits = 0;
Settings settings;
Launch launch;
bool running = false;
uint32_t block_number = 0;
Thread* current = nullptr;
std::vector<std::unique_ptr<Thread>> threads;

static Fiber host;
static std::vector<uint32_t> ready;  // a bit per lane, a word per warp
static int waiting = 0, gone = 0;    // threads at the barrier, threads that have left the kernel
static At barrier_at{};
static bool abandoned = false;
static char barrier_order[2], begin_order, end_order;  // what ThreadSanitizer knows barriers and a block's two ends by

uint64_t random_state = 0;
uint64_t random_bits() {  // splitmix64
    uint64_t z = random_state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

void make_ready(Thread& thread) {
    thread.state = State::ready;
    ready[thread.warp] |= 1u << thread.lane;
}

// The first set bit at or after `from`, around the end; the word is not 0.
static int next_bit(uint32_t word, int from) {
    const uint32_t after = word >> from << from;
    return __builtin_ctz(after ? after : word);
}

static Thread* pick() {
    const int warps = static_cast<int>(ready.size());
    const int here = current ? current->id : settings.schedule == Schedule::reverse ? 0 : launch.threads - 1;
    int warp = here / kWarp, lane = 0;
    switch (settings.schedule) {
        case Schedule::forward: {
            const int next = (here + 1) % launch.threads;
            warp = next / kWarp;
            const uint32_t rest = ready[warp] >> next % kWarp << next % kWarp;
            if (rest) {
                lane = __builtin_ctz(rest);
                break;
            }
            int tried = 0;
            do warp = (warp + 1) % warps;
            while (!ready[warp] && ++tried < warps);
            if (!ready[warp]) return nullptr;
            lane = __builtin_ctz(ready[warp]);
            break;
        }
        case Schedule::reverse: {
            const int next = (here + launch.threads - 1) % launch.threads;
            warp = next / kWarp;
            const uint32_t rest = ready[warp] & 0xffffffffu >> (kWarp - 1 - next % kWarp);
            if (rest) {
                lane = 31 - __builtin_clz(rest);
                break;
            }
            int tried = 0;
            do warp = (warp + warps - 1) % warps;
            while (!ready[warp] && ++tried < warps);
            if (!ready[warp]) return nullptr;
            lane = 31 - __builtin_clz(ready[warp]);
            break;
        }
        case Schedule::random: {
            const uint64_t bits = random_bits();
            warp = static_cast<int>((bits >> 32) % warps);
            for (int tried = 0; !ready[warp]; warp = (warp + 1) % warps)
                if (++tried > warps) return nullptr;
            lane = next_bit(ready[warp], bits % kWarp);
            break;
        }
        case Schedule::warp_by_warp: {
            for (int tried = 0; !ready[warp]; warp = (warp + 1) % warps)
                if (++tried > warps) return nullptr;
            lane = next_bit(ready[warp], (here + 1) % kWarp);
            break;
        }
    }
    return threads[warp * kWarp + lane].get();
}

static std::string where_all_wait() {
    std::string text;
    for (int i = 0; i < launch.threads; ++i) {
        const Thread& t = *threads[i];
        if (t.state == State::gone) continue;
        text += print("%s%s waits at %s", text.empty() ? "" : "; ", name_thread(t).c_str(), name_place(t.at).c_str());
        if (text.size() > 300) return text + "; ...";
    }
    return text;
}

// A collective that some lane waits in: nothing else can stop all threads, because a barrier that all have reached opens.
static At stuck_at() {
    for (int i = 0; i < launch.threads; ++i)
        if (threads[i]->state == State::in_collective) return threads[i]->at;
    return launch.at;
}

static void enter(Thread& thread) {
    current = &thread;
    threadIdx = thread.index;
    ready[thread.warp] &= ~(1u << thread.lane);
}

void yield() {
    Thread* me = current;
    Thread* next = pick();
    if (!next) fail("warp", stuck_at(), "no thread can go on: %s", where_all_wait().c_str());
    enter(*next);
    if (next != me) Fiber::change(me->fiber, next->fiber);
}

// What every fiber runs: the kernel, once for each block.
static void thread_main() {
    Fiber::arrived();
    for (;;) {
        Thread* me = current;
        acquire(&begin_order);
        launch.call(launch.body);
        finish_copies(*me);
        release(&end_order);
        me->state = State::gone;
        ++gone;
        if (waiting)
            fail("divergence", barrier_at, "a barrier that %d threads wait at is never reached by %s, which has left the kernel",
                 waiting, name_thread(*me).c_str());
        Thread* next = pick();
        if (next) {
            enter(*next);
            Fiber::change(me->fiber, next->fiber);
        } else if (gone == launch.threads) {
            Fiber::change(me->fiber, host);
        } else {
            fail("warp", stuck_at(), "a warp's collective waits for lanes that have left the kernel: %s", where_all_wait().c_str());
        }
    }
}

void barrier(At at) {
    Thread* me = current;
    me->at = at;
    if (gone)
        fail("divergence", at, "%s reaches this barrier, but %d threads of its block have left the kernel", name_thread(*me).c_str(),
             gone);
    if (waiting && (barrier_at.line != at.line || std::strcmp(barrier_at.file, at.file)))
        fail("divergence", at, "%s waits at this barrier, while %d threads wait at the one of %s", name_thread(*me).c_str(),
             waiting, name_place(barrier_at).c_str());
    barrier_at = at;
    me->state = State::at_barrier;
    const unsigned parity = me->barriers++ & 1;
    release(&barrier_order[parity]);
    if (++waiting == launch.threads) {
        waiting = 0;
        next_interval();
        for (int i = 0; i < launch.threads; ++i) make_ready(*threads[i]);
    }
    yield();
    acquire(&barrier_order[parity]);
}

[[noreturn]] void abandon() {
    abandoned = true;
    Fiber::change(current->fiber, host);
    __builtin_unreachable();
}

struct Limits {
    int architecture;
    size_t shared_bytes;  // a block's, opted in
};
constexpr Limits kLimits[] = {{75, 64}, {80, 163}, {86, 99}, {87, 163}, {89, 99}, {90, 227}, {100, 227}, {120, 99}};

static std::string exceeds_limits(dim3 grid, dim3 block, size_t shared_bytes) {
    const uint64_t count = uint64_t(block.x) * block.y * block.z;
    if (!count || !grid.x || !grid.y || !grid.z)
        return print("an empty launch: grid (%u, %u, %u), block (%u, %u, %u)", grid.x, grid.y, grid.z, block.x, block.y, block.z);
    if (count > 1024 || block.z > 64)
        return print("a block of (%u, %u, %u) threads; a GPU takes 1024, and 64 along z", block.x, block.y, block.z);
    if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
        return print("a grid of (%u, %u, %u) blocks; a GPU takes (2147483647, 65535, 65535)", grid.x, grid.y, grid.z);
    size_t most = 48;
    for (const Limits& limits : kLimits)
        if (limits.architecture == settings.architecture) most = limits.shared_bytes;
    if (shared_bytes > most * 1024)
        return print("%zu bytes of shared memory; sm_%d has %zu for a block", shared_bytes, settings.architecture, most * 1024);
    return "";
}

static void prepare_threads() {
    while (static_cast<int>(threads.size()) < launch.threads) {
        threads.push_back(std::make_unique<Thread>());
        threads.back()->fiber.create(thread_main);
    }
    for (int i = 0; i < launch.threads; ++i) {
        Thread& t = *threads[i];
        const unsigned x = launch.block.x, y = launch.block.y;
        t.index = {i % x, i / x % y, i / x / y};
        t.id = i;
        t.warp = i / kWarp;
        t.lane = i % kWarp;
    }
}

static void run_block(uint32_t number) {
    block_number = number;
    blockIdx = {number % launch.grid.x, number / launch.grid.x % launch.grid.y, number / launch.grid.x / launch.grid.y};
    begin_shared();
    begin_race_block();
    waiting = gone = 0;
    for (int i = 0; i < launch.threads; ++i) {
        Thread& t = *threads[i];
        t.barriers = 0;
        t.copies.clear();
#ifdef TINYDIFF_SIM_TSAN
        t.warp_syncs.clear();
#endif
        make_ready(t);
    }
    release(&begin_order);
    current = nullptr;
    Thread* first = pick();
    enter(*first);
    Fiber::change(host, first->fiber);
    acquire(&end_order);
    current = nullptr;
    if (!abandoned) end_shared();
}

int run(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes, void (*call)(void*), void* body, At at) {
    if (running) return 1;
    launch.kernel = kernel;
    launch.at = at;
    launch.grid = gridDim = grid;
    launch.block = blockDim = block;
    launch.shared_bytes = shared_bytes;
    launch.call = call;
    launch.body = body;
    ++launch.number;
    if (std::string what = exceeds_limits(grid, block, shared_bytes); !what.empty()) {
        note("limit", at, what);
        return 1;
    }
    launch.threads = static_cast<int>(block.x * block.y * block.z);
    ready.assign((launch.threads + kWarp - 1) / kWarp, 0);
    random_state = settings.seed;
    prepare_threads();
    begin_race_launch();

    std::vector<uint32_t> order(size_t(grid.x) * grid.y * grid.z);
    std::iota(order.begin(), order.end(), 0u);
    if (settings.schedule == Schedule::reverse) std::reverse(order.begin(), order.end());
    if (settings.schedule == Schedule::random)
        for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random_bits() % i]);

    running = true;
    abandoned = false;
    for (uint32_t number : order) {
        run_block(number);
        if (abandoned) break;
    }
    running = false;
    if (abandoned) threads.clear();  // their stacks are in the middle of the kernel
    return anything_found() ? 1 : 0;
}

}  // namespace sim
