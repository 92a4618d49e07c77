// softmax and log_softmax over rows; and their gradients.
//
// Computes: y = exp(x - max) / sum, or x - max - log sum, for x (rows, size); gx = y (gy - sum gy y), or gy - exp(y) sum gy.
// Tiling: a warp a row. The first pass over a row keeps, a lane, the largest value so far and the sum of exponentials about it,
//   which is rescaled whenever the largest grows ("online", Milakov & Gimelshein 2018); lanes are joined by shuffles.
// Bound by: memory: two reads (the second from the cache, for rows of less than some ten thousand) and one write.
#include "reduce.h"

constexpr int kWarps = 8, kThreads = 32 * kWarps;

template <class T>
KERNEL_BOUNDS(kThreads, 4)
softmax_rows(int rows, int size, bool logarithmic, const T* x, T* y) {
    const int row = blockIdx.x * kWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows && !MUTANT(781, "softmax: warps past the last row return")) return;
    const T* from = x + size_t(row) * size;
    T largest = T(-INFINITY), sum = 0;
    for (int i = lane; i < size; i += 32) {
        const T v = ld(from + i);
        if (v > largest) {
            sum = sum * exponential(largest - v) + T(1);
            largest = v;
        } else {
            sum += v == largest ? T(1) : exponential(v - largest);  // equal infinities are not subtracted
        }
    }
    const T all = warp_max(largest);
    sum = warp_sum(largest == all ? sum : sum * exponential(largest - all));
    const T shift = logarithmic ? logarithm(sum) : T(0);
    for (int i = lane; i < size; i += 32) {
        const T d = ld(from + i) - all;
        st(y + size_t(row) * size + i, logarithmic ? d - shift : exponential(d) / sum);
    }
}

template <class T>
KERNEL_BOUNDS(kThreads, 4)
softmax_gradient(int rows, int size, bool logarithmic, const T* gy, const T* y, T* gx) {
    const int row = blockIdx.x * kWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows && !MUTANT(782, "softmax gradient: warps past the last row return")) return;
    const size_t first = size_t(row) * size;
    T sum = 0;
    for (int i = lane; i < size; i += 32) sum += ld(gy + first + i) * (logarithmic ? T(1) : ld(y + first + i));
    sum = warp_sum(sum);
    for (int i = lane; i < size; i += 32) {
        const T g = ld(gy + first + i), v = ld(y + first + i);
        st(gx + first + i, logarithmic ? g - exponential(v) * sum : v * (g - sum));
    }
}

template <class T>
static int forward(int rows, int size, int logarithmic, const void* x, void* y, uintptr_t stream) {
    return LAUNCH(softmax_rows<T>, ceil_div(rows, kWarps), kThreads, 0, stream, rows, size, logarithmic != 0,
                  static_cast<const T*>(x), static_cast<T*>(y));
}

template <class T>
static int backward(int rows, int size, int logarithmic, const void* gy, const void* y, void* gx, uintptr_t stream) {
    return LAUNCH(softmax_gradient<T>, ceil_div(rows, kWarps), kThreads, 0, stream, rows, size, logarithmic != 0,
                  static_cast<const T*>(gy), static_cast<const T*>(y), static_cast<T*>(gx));
}

int softmax(int precision, int rows, int size, int logarithmic, const void* x, void* y, uintptr_t stream) {
    if (precision > kFloat64 || rows <= 0 || size <= 0) return kUnsupported;
    return (precision == kFloat64 ? forward<double> : forward<float>)(rows, size, logarithmic, x, y, stream);
}

int softmax_backward(int precision, int rows, int size, int logarithmic, const void* gy, const void* y, void* gx,
                     uintptr_t stream) {
    if (precision > kFloat64 || rows <= 0 || size <= 0) return kUnsupported;
    return (precision == kFloat64 ? backward<double> : backward<float>)(rows, size, logarithmic, gy, y, gx, stream);
}
