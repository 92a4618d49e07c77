// The one header a kernel file includes: the same source is CUDA under nvcc and C++ under g++ -DTINYDIFF_SIM.
//
//   KERNEL void f(P p)           a kernel; KERNEL_BOUNDS(threads, blocks) f(P p) is one with __launch_bounds__
//   DEVICE, HOST_DEVICE          functions that kernels call (always inlined on the GPU)
//   threadIdx, blockIdx, blockDim, gridDim, float2, float4, double2, uint4, int2, int4, fmaf, ...   as in CUDA
//   SHARED(Storage, s)           the block's one dynamic shared buffer, seen as a struct
//   BARRIER()                    __syncthreads
//   WARP_SYNC(mask)              __syncwarp; SHFL, SHFL_XOR, SHFL_DOWN, SHFL_UP, BALLOT: the *_sync collectives
//   ld(p), st(p, v)              one element of global memory
//   load128<V>(p), store128(p, v)   16 bytes of global memory as V (float4 unless named); p is 16-byte aligned
//   lds128<V>(p), sts128(p, v)      the same for shared memory
//   cp_async16(dst, src, valid)  16 bytes from global to shared memory, zeros where not valid (src is then not read);
//   cp_async4(dst, src, valid)   the same for 4 bytes (any alignment of floats)
//   cp_async_commit(), cp_async_wait<N>()   close a group; wait until at most N groups are on their way
//   ldmatrix_x4(r, row), ldmatrix_x4_trans(r, row)
//   mma_m16n8k8_tf32(d, a, b), mma_m16n8k16_bf16(d, a, b)   d += a b for a warp; fragments as in the PTX manual
//   to_tf32(x), pack_bf16x2(low, high)      rounding to the inputs of the tensor cores, as bits
//   LAUNCH(kernel, grid, block, shared_bytes, stream, arguments...)   0, or an error code for launch_message()
//   MUTANT(n, "what it breaks")  false; the simulator can switch one number on, to prove that a check notices.
//                                Numbers are unique and stay as they are: if (!MUTANT(101, "...")) BARRIER();
//
// On GPUs older than sm_80, cp_async copies at once and the tensor-core functions trap: choose kernels by capability.
#pragma once

#ifdef TINYDIFF_SIM
#include "sim/sim.h"
#else

#include <cuda_runtime.h>

#include <cstdint>

#define KERNEL __global__
#define KERNEL_BOUNDS(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define DEVICE __device__ __forceinline__
#define HOST_DEVICE __host__ __device__ __forceinline__
#define UNROLL _Pragma("unroll")
// The size of a dynamic buffer is known at the launch only: a comment in the PTX tells it to whoever counts occupancy.
#define SHARED(Storage, name)                                                  \
    extern __shared__ __align__(128) unsigned char shared_bytes_[];            \
    asm volatile("// shared bytes: %0" ::"n"(static_cast<int>(sizeof(Storage)))); \
    Storage& name = *reinterpret_cast<Storage*>(shared_bytes_)
#define BARRIER() __syncthreads()
#define WARP_SYNC(mask) __syncwarp(mask)
#define SHFL(mask, value, lane) __shfl_sync(mask, value, lane)
#define SHFL_XOR(mask, value, lanes) __shfl_xor_sync(mask, value, lanes)
#define SHFL_DOWN(mask, value, delta) __shfl_down_sync(mask, value, delta)
#define SHFL_UP(mask, value, delta) __shfl_up_sync(mask, value, delta)
#define BALLOT(mask, predicate) __ballot_sync(mask, predicate)
#define MUTANT(number, what) false
#define LAUNCH(kernel, ...) launch_kernel(kernel, __VA_ARGS__)

inline const char* launch_message(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

template <class... Parameters, class... Arguments>
int launch_kernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, std::uintptr_t stream,
                  Arguments... arguments) {
    if (shared_bytes > 48 * 1024) {  // more than every GPU grants unasked
        cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                 cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
        if (error != cudaSuccess) {
            cudaGetLastError();  // it is returned, so it shall not be met again by the next launch
            return error;
        }
    }
    kernel<<<grid, block, shared_bytes, reinterpret_cast<cudaStream_t>(stream)>>>(Parameters(arguments)...);
    return cudaGetLastError();
}

template <class T>
DEVICE T ld(const T* p) {
    return *p;
}
template <class T, class U>
DEVICE void st(T* p, U value) {
    *p = value;
}
template <class V = float4, class T>
DEVICE V load128(const T* p) {
    static_assert(sizeof(V) == 16, "load128 moves 16 bytes");
    return *reinterpret_cast<const V*>(p);
}
template <class V, class T>
DEVICE void store128(T* p, V value) {
    static_assert(sizeof(V) == 16, "store128 moves 16 bytes");
    *reinterpret_cast<V*>(p) = value;
}
template <class V = float4, class T>
DEVICE V lds128(const T* p) {
    return load128<V>(p);
}
template <class V, class T>
DEVICE void sts128(T* p, V value) {
    store128(p, value);
}

DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

DEVICE void cp_async16(void* dst, const void* src, bool valid = true) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(dst)), "l"(src), "r"(valid ? 16 : 0)
                 : "memory");
#else
    *static_cast<uint4*>(dst) = valid ? *static_cast<const uint4*>(src) : uint4{};
#endif
}
DEVICE void cp_async4(void* dst, const void* src, bool valid = true) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(dst)), "l"(src), "r"(valid ? 4 : 0)
                 : "memory");
#else
    *static_cast<uint32_t*>(dst) = valid ? *static_cast<const uint32_t*>(src) : 0u;
#endif
}
DEVICE void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int kGroups>
DEVICE void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
#endif
}

DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
DEVICE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    __trap();
#endif
}
DEVICE void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    __trap();
#endif
}
DEVICE uint32_t to_tf32(float x) {
    uint32_t bits = __float_as_uint(x);
#if __CUDA_ARCH__ >= 800
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
#endif
    return bits;
}
DEVICE uint32_t pack_bf16x2(float low, float high) {
    uint32_t bits = 0;
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
#else
    __trap();
#endif
    return bits;
}

#endif
