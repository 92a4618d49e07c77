// Warp collectives: each synchronises the lanes of its mask and no others. The last lane to arrive does the exchange for all,
// on operands that lie on the waiting lanes' stacks.
#include <algorithm>

#include "runtime.h"

namespace sim {

using Exchange = void (*)(Thread* const* lanes, unsigned mask);

static bool same_place(At a, At b) { return a.line == b.line && (a.file == b.file || !std::strcmp(a.file, b.file)); }

static void collective(const char* what, unsigned mask, void* operand, At at, Exchange exchange) {
    Thread& me = *current;
    me.at = at;
    me.mask = mask;
    me.operand = operand;
    if (!(mask >> me.lane & 1))
        fail("warp", at, "%s calls %s for the lanes %#x, of which it is none", name_thread(me).c_str(), what, mask);
    const int first = me.warp * kWarp;
    const int present = std::min(kWarp, launch.threads - first);
    if (present < kWarp && mask >> present)
        fail("warp", at, "%s names the lanes %#x of a warp that has %d threads", what, mask, present);
    Thread* lanes[kWarp]{};
    bool complete = true;
    for (int lane = 0; lane < present; ++lane) {
        if (!(mask >> lane & 1)) continue;
        Thread& other = *threads[first + lane];
        lanes[lane] = &other;
        if (&other == &me) continue;
        if (other.state == State::gone)
            fail("warp", at, "%s waits for lane %d, which has left the kernel", what, lane);
        if (other.state == State::at_barrier)
            fail("warp", at, "%s waits for lane %d, which waits at the barrier of %s", what, lane, name_place(other.at).c_str());
        if (other.state == State::in_collective && same_place(other.at, at) && other.mask != mask)
            fail("warp", at, "%s is called for the lanes %#x by lane %d and for the lanes %#x by lane %d", what, mask, me.lane,
                 other.mask, lane);
        if (other.state == State::in_collective && !same_place(other.at, at) && other.mask >> me.lane & 1)
            fail("warp", at, "lane %d waits here (%s) for lane %d, which waits for it at %s", me.lane, what, lane,
                 name_place(other.at).c_str());
        complete = complete && other.state == State::in_collective && same_place(other.at, at) && other.mask == mask;
    }
    me.state = State::in_collective;
    if (complete) {
        if (exchange) exchange(lanes, mask);
        for (Thread* lane : lanes)
            if (lane) make_ready(*lane);
    }
    yield();
}

#ifdef TINYDIFF_SIM_TSAN
static char* order_of(int warp, unsigned mask, unsigned parity) {
    static std::map<std::pair<int, unsigned>, std::unique_ptr<char[]>> objects;
    auto& object = objects[{warp, mask}];
    if (!object) object = std::make_unique<char[]>(2);
    return &object[parity];
}
#endif

void warp_sync(unsigned mask, At at) {
#ifdef TINYDIFF_SIM_TSAN
    char* order = order_of(current->warp, mask, current->warp_syncs[mask]++ & 1);
    release(order);
#endif
    collective("WARP_SYNC", mask, nullptr, at, [](Thread* const* lanes, unsigned) { order_lanes(lanes); });
#ifdef TINYDIFF_SIM_TSAN
    acquire(order);
#endif
}

// memcpy, but unseen: ThreadSanitizer watches the C library's, and lanes that exchange registers race for nothing.
static void move(volatile char* to, const volatile char* from, size_t bytes) {
    for (size_t i = 0; i < bytes; ++i) to[i] = from[i];
}

struct ShuffleOperand {
    char* value;
    size_t bytes;
    Shuffle how;
    int operand;
    char before[16];
};

void shuffle(void* value, size_t bytes, Shuffle how, int operand, unsigned mask, At at) {
    ShuffleOperand mine{static_cast<char*>(value), bytes, how, operand, {}};
    if (bytes > sizeof mine.before) fail("warp", at, "a shuffle of %zu bytes; it takes 16 at most", bytes);
    collective("a shuffle", mask, &mine, at, [](Thread* const* lanes, unsigned mask) {
        for (int lane = 0; lane < kWarp; ++lane)
            if (lanes[lane]) {
                auto& s = *static_cast<ShuffleOperand*>(lanes[lane]->operand);
                move(s.before, s.value, s.bytes);
            }
        for (int lane = 0; lane < kWarp; ++lane) {
            if (!lanes[lane]) continue;
            auto& s = *static_cast<ShuffleOperand*>(lanes[lane]->operand);
            int source = s.how == Shuffle::exclusive_or ? lane ^ s.operand
                         : s.how == Shuffle::down       ? lane + s.operand
                         : s.how == Shuffle::up         ? lane - s.operand
                                                        : s.operand & (kWarp - 1);
            if (source < 0 || source >= kWarp) source = lane;
            if (!(mask >> source & 1))
                fail("warp", lanes[lane]->at, "lane %d of a shuffle reads from lane %d, which is none of the lanes %#x", lane, source,
                     mask);
            move(s.value, static_cast<ShuffleOperand*>(lanes[source]->operand)->before, s.bytes);
        }
    });
}

unsigned ballot(unsigned mask, bool predicate, At at) {
    unsigned bits = predicate;
    collective("BALLOT", mask, &bits, at, [](Thread* const* lanes, unsigned) {
        unsigned all = 0;
        for (int lane = 0; lane < kWarp; ++lane)
            if (lanes[lane] && *static_cast<unsigned*>(lanes[lane]->operand)) all |= 1u << lane;
        for (int lane = 0; lane < kWarp; ++lane)
            if (lanes[lane]) *static_cast<unsigned*>(lanes[lane]->operand) = all;
    });
    return bits;
}

// Where the registers of a fragment lie in its matrix (PTX, "Matrix Fragments for mma.m16n8k8 / mma.m16n8k16"): lane l holds, as
// its i-th element, the element of this row and column.
struct Place {
    int row, column;
};
// 32-bit elements: a is 16 x 8, b is 8 x 8
static Place place_a32(int lane, int i) { return {lane / 4 + i % 2 * 8, lane % 4 + i / 2 * 4}; }
static Place place_b32(int lane, int i) { return {lane % 4 + i * 4, lane / 4}; }
// 16-bit elements, two a register: a is 16 x 16, b is 16 x 8
static Place place_a16(int lane, int i) { return {lane / 4 + i / 2 % 2 * 8, lane % 4 * 2 + i % 2 + i / 4 * 8}; }
static Place place_b16(int lane, int i) { return {lane % 4 * 2 + i % 2 + i / 2 * 8, lane / 4}; }
// the accumulator, 16 x 8 floats
static Place place_d(int lane, int i) { return {lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2}; }

struct MmaOperand {
    float* d;
    const uint32_t* a;
    const uint32_t* b;
};

static float tf32(const uint32_t* registers, int i) { return __uint_as_float(registers[i] & ~0x1fffu); }
static float bf16(const uint32_t* registers, int i) { return __uint_as_float(registers[i / 2] >> i % 2 * 16 << 16); }

template <int kDepth, int kA, int kB>
static void multiply(Thread* const* lanes, Place (*place_a)(int, int), Place (*place_b)(int, int),
                     float (*element)(const uint32_t*, int)) {
    float a[16][kDepth], b[kDepth][8];
    for (int lane = 0; lane < kWarp; ++lane) {
        auto& m = *static_cast<MmaOperand*>(lanes[lane]->operand);
        for (int i = 0; i < kA; ++i) a[place_a(lane, i).row][place_a(lane, i).column] = element(m.a, i);
        for (int i = 0; i < kB; ++i) b[place_b(lane, i).row][place_b(lane, i).column] = element(m.b, i);
    }
    for (int lane = 0; lane < kWarp; ++lane) {
        auto& m = *static_cast<MmaOperand*>(lanes[lane]->operand);
        for (int i = 0; i < 4; ++i) {
            const Place at = place_d(lane, i);
            double sum = 0;
            for (int k = 0; k < kDepth; ++k) sum += double(a[at.row][k]) * b[k][at.column];
            m.d[i] = float(m.d[i] + sum);
        }
    }
}

void mma_m16n8k8_tf32(float* d, const uint32_t* a, const uint32_t* b, At at) {
    MmaOperand mine{d, a, b};
    collective("mma_m16n8k8_tf32", 0xffffffffu, &mine, at,
               [](Thread* const* lanes, unsigned) { multiply<8, 4, 2>(lanes, place_a32, place_b32, tf32); });
}

void mma_m16n8k16_bf16(float* d, const uint32_t* a, const uint32_t* b, At at) {
    MmaOperand mine{d, a, b};
    collective("mma_m16n8k16_bf16", 0xffffffffu, &mine, at,
               [](Thread* const* lanes, unsigned) { multiply<16, 8, 4>(lanes, place_a16, place_b16, bf16); });
}

struct MatrixOperand {
    uint32_t* r;
    const uint16_t* row;  // lane l brings the address of row l % 8 of matrix l / 8
};

void ldmatrix_x4(uint32_t* r, const void* row, bool transpose, At at) {
    const void* pc = __builtin_return_address(0);
    check_shared(row, 16, Access::read, at);
    record(row, 16, Access::read, at, pc);
    see(row, 16, Access::read, pc);
    tell_read(row, 16, pc);
    MatrixOperand mine{r, static_cast<const uint16_t*>(row)};
    auto exchange = [](Thread* const* lanes, bool transpose) {
        for (int lane = 0; lane < kWarp; ++lane)
            for (int matrix = 0; matrix < 4; ++matrix) {
                auto element = [&](int i, int j) -> uint32_t {
                    return static_cast<MatrixOperand*>(lanes[matrix * 8 + i]->operand)->row[j];
                };
                const int i = lane / 4, j = lane % 4 * 2;
                const uint32_t low = transpose ? element(j, i) : element(i, j);
                const uint32_t high = transpose ? element(j + 1, i) : element(i, j + 1);
                static_cast<MatrixOperand*>(lanes[lane]->operand)->r[matrix] = low | high << 16;
            }
    };
    static auto run = exchange;
    if (transpose)
        collective("ldmatrix_x4_trans", 0xffffffffu, &mine, at, [](Thread* const* lanes, unsigned) { run(lanes, true); });
    else
        collective("ldmatrix_x4", 0xffffffffu, &mine, at, [](Thread* const* lanes, unsigned) { run(lanes, false); });
}

}  // namespace sim
