// CUDA's vocabulary for g++: what launch.h promises, as calls of the simulator (runtime.cpp).
//
// A block's threads are fibers of one OS thread; they change places only where threads of a GPU can wait for each other
// (barriers, warp collectives), in the order of the chosen schedule. Every call carries the line it was made at.
#pragma once

#include <cstddef>

#include "vector.h"

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace sim {

struct At {
    const char* file;
    int line;
    const void* pc = nullptr;  // instead of a file, where an access has no call of ours
};
constexpr At here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }

enum class Access { read, write, atomic };
enum class Shuffle { index, exclusive_or, down, up };

extern int mutant;        // the number that is switched on; 0 is none
extern long mutant_hits;  // how often it was reached

void barrier(At at = here());
void warp_sync(unsigned mask, At at = here());
void shuffle(void* value, size_t bytes, Shuffle how, int operand, unsigned mask, At at);
unsigned ballot(unsigned mask, bool predicate, At at = here());

void* shared_buffer(size_t bytes, size_t alignment, At at = here());
void read_global(void* value, const void* p, size_t bytes, At at);
void write_global(void* p, const void* value, size_t bytes, At at);
void read_shared(void* value, const void* p, size_t bytes, At at);
void write_shared(void* p, const void* value, size_t bytes, At at);

int atomic_add(int* p, int value, At at);
unsigned atomic_add(unsigned* p, unsigned value, At at);
float atomic_add(float* p, float value, At at);
double atomic_add(double* p, double value, At at);

void cp_async(void* dst, const void* src, size_t bytes, bool valid, At at);
void cp_async_commit();
void cp_async_wait(int groups);

void ldmatrix_x4(uint32_t* r, const void* row, bool transpose, At at);
void mma_m16n8k8_tf32(float* d, const uint32_t* a, const uint32_t* b, At at);
void mma_m16n8k16_bf16(float* d, const uint32_t* a, const uint32_t* b, At at);

// Runs call(body) once for each thread of each block. Returns 0, or 1 if something was found (launch_message says what).
int run(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes, void (*call)(void*), void* body, At at);

template <class T>
T shuffled(T value, Shuffle how, int operand, unsigned mask, At at) {
    shuffle(&value, sizeof value, how, operand, mask, at);
    return value;
}

}  // namespace sim

extern "C" const char* launch_message(int error);

#define KERNEL
#define KERNEL_BOUNDS(threads, blocks) void
#define DEVICE inline
#define HOST_DEVICE inline
#define UNROLL
#define SHARED(Storage, name) Storage& name = *static_cast<Storage*>(sim::shared_buffer(sizeof(Storage), alignof(Storage)))
#define BARRIER() sim::barrier()
#define WARP_SYNC(mask) sim::warp_sync(mask)
#define SHFL(mask, value, lane) sim::shuffled(value, sim::Shuffle::index, lane, mask, sim::here())
#define SHFL_XOR(mask, value, lanes) sim::shuffled(value, sim::Shuffle::exclusive_or, lanes, mask, sim::here())
#define SHFL_DOWN(mask, value, delta) sim::shuffled(value, sim::Shuffle::down, delta, mask, sim::here())
#define SHFL_UP(mask, value, delta) sim::shuffled(value, sim::Shuffle::up, delta, mask, sim::here())
#define BALLOT(mask, predicate) sim::ballot(mask, predicate)
#define MUTANT(number, what) (sim::mutant == (number) && ++sim::mutant_hits)
#define LAUNCH(kernel, ...) launch_kernel(#kernel, sim::here(), kernel, __VA_ARGS__)

template <class... Parameters, class... Arguments>
int launch_kernel(const char* name, sim::At at, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                  std::uintptr_t, Arguments... arguments) {
    auto body = [&] { kernel(Parameters(arguments)...); };
    return sim::run(name, grid, block, shared_bytes, [](void* f) { (*static_cast<decltype(body)*>(f))(); }, &body, at);
}

template <class T>
inline T ld(const T* p, sim::At at = sim::here()) {
    T value;
    sim::read_global(&value, p, sizeof value, at);
    return value;
}
template <class T, class U>
inline void st(T* p, U value, sim::At at = sim::here()) {
    const T element = value;
    sim::write_global(p, &element, sizeof element, at);
}
template <class V = float4, class T>
inline V load128(const T* p, sim::At at = sim::here()) {
    static_assert(sizeof(V) == 16, "load128 moves 16 bytes");
    V value;
    sim::read_global(&value, p, 16, at);
    return value;
}
template <class V, class T>
inline void store128(T* p, V value, sim::At at = sim::here()) {
    static_assert(sizeof(V) == 16, "store128 moves 16 bytes");
    sim::write_global(p, &value, 16, at);
}
template <class V = float4, class T>
inline V lds128(const T* p, sim::At at = sim::here()) {
    static_assert(sizeof(V) == 16, "lds128 moves 16 bytes");
    V value;
    sim::read_shared(&value, p, 16, at);
    return value;
}
template <class V, class T>
inline void sts128(T* p, V value, sim::At at = sim::here()) {
    static_assert(sizeof(V) == 16, "sts128 moves 16 bytes");
    sim::write_shared(p, &value, 16, at);
}

template <class T>
inline T atomicAdd(T* p, T value, sim::At at = sim::here()) {
    return sim::atomic_add(p, value, at);
}

inline void cp_async16(void* dst, const void* src, bool valid = true, sim::At at = sim::here()) {
    sim::cp_async(dst, src, 16, valid, at);
}
inline void cp_async4(void* dst, const void* src, bool valid = true, sim::At at = sim::here()) {
    sim::cp_async(dst, src, 4, valid, at);
}
inline void cp_async_commit() { sim::cp_async_commit(); }
template <int kGroups>
inline void cp_async_wait() {
    sim::cp_async_wait(kGroups);
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, sim::At at = sim::here()) { sim::ldmatrix_x4(r, row, false, at); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, sim::At at = sim::here()) {
    sim::ldmatrix_x4(r, row, true, at);
}
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], sim::At at = sim::here()) {
    sim::mma_m16n8k8_tf32(d, a, b, at);
}
inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], sim::At at = sim::here()) {
    sim::mma_m16n8k16_bf16(d, a, b, at);
}
inline uint32_t to_tf32(float x) {  // to nearest, halves away from zero; NaN and infinity stay
    uint32_t bits = __float_as_uint(x);
    return std::isfinite(x) ? (bits + 0x1000u) & ~0x1fffu : bits;
}
inline uint32_t to_bf16(float x) {  // to nearest even; NaN stays NaN
    uint32_t bits = __float_as_uint(x);
    return x != x ? 0x7fffu : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}
inline uint32_t pack_bf16x2(float low, float high) { return to_bf16(low) | to_bf16(high) << 16; }
