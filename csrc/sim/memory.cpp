// Memory as a GPU's checker would see it: which bytes exist, how they are aligned, which block wrote them; shared memory and
// the asynchronous copies into it.
#include <algorithm>

#include "runtime.h"
#include "shadow.h"

namespace sim {

char* shared_base = nullptr;
static size_t shared_capacity = 0;
static std::map<char*, Allocation> allocations;  // by first byte
static Allocation* hint = nullptr;

// Bytes around shared memory that nobody may write; AddressSanitizer has its own.
#ifdef TINYDIFF_SIM_ASAN
constexpr size_t kGuard = 0;
#else
constexpr size_t kGuard = 1024;
#endif

Allocation* find_allocation(const void* p, size_t bytes) {
    char* first = static_cast<char*>(const_cast<void*>(p));
    auto holds = [&](const Allocation& a) { return first >= a.base && first + bytes <= a.base + a.bytes; };
    if (hint && holds(*hint)) return hint;
    auto after = allocations.upper_bound(first);
    if (after == allocations.begin()) return nullptr;
    Allocation& a = std::prev(after)->second;
    return holds(a) ? hint = &a : nullptr;
}

bool in_guard(const void* p, size_t bytes) {
    char* first = static_cast<char*>(const_cast<void*>(p));
    if (first + bytes > shared_base - kGuard && first < shared_base + launch.shared_bytes + kGuard) return true;
    auto after = allocations.upper_bound(first);
    if (after != allocations.end() && first + bytes > after->second.base - after->second.guard) return true;
    if (after == allocations.begin()) return false;
    const Allocation& a = std::prev(after)->second;
    return first < a.base + a.bytes + a.guard;
}

bool in_shared(const void* p, size_t bytes) {
    const char* first = static_cast<const char*>(p);
    return shared_base && first >= shared_base && first + bytes <= shared_base + launch.shared_bytes;
}

std::string describe_place(const void* p, size_t bytes) {
    const char* first = static_cast<const char*>(p);
    if (in_shared(p, bytes)) return print("byte %td of shared memory", first - shared_base);
    if (first >= shared_base && first < shared_base + launch.shared_bytes + 4096)
        return print("byte %td of the block's %zu bytes of shared memory", first - shared_base, launch.shared_bytes);
    auto after = allocations.upper_bound(const_cast<char*>(first));
    const Allocation* nearest = nullptr;
    if (after != allocations.end()) nearest = &after->second;
    if (after != allocations.begin()) {
        const Allocation& before = std::prev(after)->second;
        if (!nearest || first - (before.base + before.bytes) < nearest->base - first) nearest = &before;
    }
    if (!nearest) return "an address outside every array";
    const ptrdiff_t offset = first - nearest->base;
    if (offset >= 0 && offset + bytes <= nearest->bytes) return print("byte %td of %s", offset, nearest->name.c_str());
    if (std::abs(offset) > ptrdiff_t(nearest->bytes) + (1 << 20)) return "an address outside every array";
    return print("byte %td of %s, which has %zu", offset, nearest->name.c_str(), nearest->bytes);
}

static const char* verb(Access access) {
    return access == Access::read ? "reads" : access == Access::write ? "writes" : "adds to";
}

static void check_alignment(const void* p, size_t bytes, Access access, At at) {
    const size_t alignment = (bytes & (bytes - 1)) == 0 && bytes <= 16 ? bytes : 4;
    if (reinterpret_cast<uintptr_t>(p) % alignment)
        fail("alignment", at, "%s %s %zu bytes at %s, an address that is not a multiple of %zu", name_thread(*current).c_str(),
             verb(access), bytes, describe_place(p, bytes).c_str(), alignment);
}

void check_global(const void* p, size_t bytes, Access access, At at) {
    if (!running) return;
    Allocation* a = find_allocation(p, bytes);
    if (!a) {
        if (access == Access::atomic && in_shared(p, bytes)) return;
        fail("bounds", at, "%s %s %zu bytes at %s", name_thread(*current).c_str(), verb(access), bytes,
             describe_place(p, bytes).c_str());
    }
    check_alignment(p, bytes, access, at);
    if (access != Access::read && !a->writable)
        fail("read-only", at, "%s writes to %s, which is only to be read", name_thread(*current).c_str(), a->name.c_str());
    if (a->writer.empty()) {
        if (access == Access::read) return;
        a->writer.assign(a->bytes / a->unit + 1, 0);
    }
    const uint64_t mine = uint64_t(launch.number) << 32 | (block_number + 1);
    const size_t offset = static_cast<const char*>(p) - a->base;
    for (size_t i = offset / a->unit; i <= (offset + bytes - 1) / a->unit; ++i) {
        uint64_t& writer = a->writer[i];
        if (writer >> 32 == launch.number && writer != mine && access != Access::atomic)
            fail("blocks", at, "%s %s byte %zu of %s, which block %u has written in the same launch", name_thread(*current).c_str(),
                 verb(access), i * a->unit, a->name.c_str(), unsigned(writer) - 1);
        if (access == Access::write) writer = mine;
    }
}

void check_shared(const void* p, size_t bytes, Access access, At at) {
    if (!in_shared(p, bytes))
        fail("bounds", at, "%s %s %zu bytes at %s", name_thread(*current).c_str(), verb(access), bytes,
             describe_place(p, bytes).c_str());
    check_alignment(p, bytes, access, at);
}

void read_global(void* value, const void* p, size_t bytes, At at) {
    const void* pc = __builtin_return_address(0);
    check_global(p, bytes, Access::read, at);
    record(p, bytes, Access::read, at, pc);
    see(p, bytes, Access::read, pc);
    tell_read(p, bytes, pc);
    std::memcpy(value, p, bytes);
}

void write_global(void* p, const void* value, size_t bytes, At at) {
    const void* pc = __builtin_return_address(0);
    check_global(p, bytes, Access::write, at);
    record(p, bytes, Access::write, at, pc);
    see(p, bytes, Access::write, pc);
    tell_write(p, bytes, pc);
    std::memcpy(p, value, bytes);
}

void read_shared(void* value, const void* p, size_t bytes, At at) {
    const void* pc = __builtin_return_address(0);
    check_shared(p, bytes, Access::read, at);
    record(p, bytes, Access::read, at, pc);
    see(p, bytes, Access::read, pc);
    tell_read(p, bytes, pc);
    std::memcpy(value, p, bytes);
}

void write_shared(void* p, const void* value, size_t bytes, At at) {
    const void* pc = __builtin_return_address(0);
    check_shared(p, bytes, Access::write, at);
    record(p, bytes, Access::write, at, pc);
    see(p, bytes, Access::write, pc);
    tell_write(p, bytes, pc);
    std::memcpy(p, value, bytes);
}

template <class T>
static T add(T* p, T value, At at, const void* pc) {
    check_global(p, sizeof(T), Access::atomic, at);
    record(p, sizeof(T), Access::atomic, at, pc);
    see(p, sizeof(T), Access::atomic, pc);
    const T old = *p;
    *p = old + value;
    return old;
}
int atomic_add(int* p, int value, At at) { return add(p, value, at, __builtin_return_address(0)); }
unsigned atomic_add(unsigned* p, unsigned value, At at) { return add(p, value, at, __builtin_return_address(0)); }
float atomic_add(float* p, float value, At at) { return add(p, value, at, __builtin_return_address(0)); }
double atomic_add(double* p, double value, At at) { return add(p, value, at, __builtin_return_address(0)); }

void poison(void* p, size_t bytes) {
    for (size_t i = 0; i < bytes; i += 4) std::memcpy(static_cast<char*>(p) + i, &kPoison, std::min<size_t>(4, bytes - i));
}

void begin_shared() {
    const size_t bytes = launch.shared_bytes + 2 * kGuard;
    if (bytes != shared_capacity) {
        std::free(shared_base ? shared_base - kGuard : nullptr);
        void* p = nullptr;
        if (posix_memalign(&p, 1024, bytes ? bytes : 1)) throw std::bad_alloc();
        shared_base = static_cast<char*>(p) + kGuard;
        shared_capacity = bytes;
    }
    poison(shared_base - kGuard, bytes);
}

void end_shared() {
    for (size_t i = 0; i < kGuard; ++i) {
        const char expected = static_cast<char>(kPoison >> 8 * (i % 4));
        if (shared_base[ptrdiff_t(i) - ptrdiff_t(kGuard)] != expected)
            return note("bounds", launch.at, print("block %u wrote in front of shared memory", block_number));
        const size_t after = launch.shared_bytes + i;
        if (shared_base[after] != static_cast<char>(kPoison >> 8 * (after % 4)))
            return note("bounds", launch.at,
                        print("block %u wrote byte %zu of its %zu bytes of shared memory", block_number, after, launch.shared_bytes));
    }
}

void* shared_buffer(size_t bytes, size_t alignment, At at) {
    if (bytes > launch.shared_bytes)
        fail("limit", at, "the kernel's shared memory takes %zu bytes; it was launched with %zu", bytes, launch.shared_bytes);
    if (alignment > 128) fail("alignment", at, "shared memory asks for an alignment of %zu; it has 128", alignment);
    return shared_base;
}

static void copy_now(const Copy& copy) {
    if (copy.src) {
        tell_read(copy.src, copy.bytes, copy.pc);
        std::memcpy(copy.dst, copy.src, copy.bytes);
    } else {
        std::memset(copy.dst, 0, copy.bytes);
    }
    tell_write(copy.dst, copy.bytes, copy.pc);
}

void cp_async(void* dst, const void* src, size_t bytes, bool valid, At at) {
    const void* pc = __builtin_return_address(0);
    check_shared(dst, bytes, Access::write, at);
    record(dst, bytes, Access::write, at, pc);
    if (valid) {
        check_global(src, bytes, Access::read, at);
        record(src, bytes, Access::read, at, pc);
        see(src, bytes, Access::read, pc);
    }
    see_copy(dst, bytes, true, pc);
    current->copies.push_back({dst, valid ? src : nullptr, bytes, current->group, pc});
    if (settings.late_copies) {
        poison(dst, bytes);
        tell_write(dst, bytes, pc);
    } else {
        copy_now(current->copies.back());
    }
}

void cp_async_commit() { ++current->group; }

// Copies of all groups before this one.
static void finish_before(Thread& thread, unsigned group) {
    size_t done = 0;
    for (; done < thread.copies.size() && thread.copies[done].group < group; ++done) {
        const Copy& copy = thread.copies[done];
        if (settings.late_copies) copy_now(copy);
        see_copy(copy.dst, copy.bytes, false, copy.pc);
    }
    thread.copies.erase(thread.copies.begin(), thread.copies.begin() + done);
}

void cp_async_wait(int groups) {
    if (current->group > unsigned(groups)) finish_before(*current, current->group - groups);
}

void finish_copies(Thread& thread) {
    finish_before(thread, ++thread.group);
    thread.group = 0;
}

}  // namespace sim

using namespace sim;

// An array that kernels may use: `item` bytes an element, with `guard` bytes on either side that nobody may touch.
API void sim_track(void* p, size_t bytes, int item, int writable, size_t guard, const char* name) {
    char* base = static_cast<char*>(p);
    hint = nullptr;
    const size_t unit = item > 0 && item < 4 ? size_t(item) : 4;
    allocations.insert_or_assign(base, Allocation{base, bytes, unit, writable != 0, guard, name, {}, {}});
}

API void sim_untrack(void* p) {
    hint = nullptr;
    allocations.erase(static_cast<char*>(p));
}
