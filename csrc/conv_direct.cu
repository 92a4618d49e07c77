// direct: the convolution as its formula stands. Chapter one, and the oracle of all later ones.
//
// Computes: y[n,p,q,o] = sum over r,s,c of x[n, p sh + r - top, q sw + s - left, c] w[r,s,c,o], its gradient by x, and its
//   gradient by w; any stride, padding and kernel size, float32 and float64.
// Tiling: none, one result a thread. Neighbouring threads have neighbouring channels, so what they read of w (or of y) and
//   what they write lies side by side: 32 lanes make one request of 128 bytes. All lanes read the same x: a broadcast.
// Bound by: requests. Two loads for each multiplication, where a GPU has four times as many multipliers as load units,
//   and every value of x is read o times (from the caches, if it fits them).
// The input gradient asks for each pixel which outputs it went into: (h + top - r) must be a multiple of the stride.
// The weight gradient is cut into parts along the pixels (splitk_reduce.h).
#include "conv.h"
#include "splitk_reduce.h"

constexpr int kThreads = 128;

template <class T>
KERNEL_BOUNDS(kThreads, 1) direct_forward(ConvSize a, Epilogue<T> epilogue, const T* x, const T* w, T* y) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= unsigned(a.n * a.p * a.q * a.o) && !MUTANT(111, "direct forward: threads past the end return")) return;
    const int o = i % a.o, pixel = i / a.o, q = pixel % a.q, p = pixel / a.q % a.p, n = pixel / a.q / a.p;
    T sum = 0;
    for (int r = 0; r < a.kh; ++r) {
        const int h = p * a.sh - a.top + r;
        if (h < 0 && !MUTANT(112, "direct forward: rows above the image are zeros")) continue;
        if (h >= a.h && !MUTANT(113, "direct forward: rows below the image are zeros")) continue;
        for (int s = 0; s < a.kw; ++s) {
            const int v = q * a.sw - a.left + s;
            if (v < 0 && !MUTANT(114, "direct forward: columns left of the image are zeros")) continue;
            if (v >= a.w && !MUTANT(115, "direct forward: columns right of the image are zeros")) continue;
            const T* px = x + ((n * a.h + h) * a.w + v) * a.c;
            const T* pw = w + (r * a.kw + s) * a.c * a.o + o;
            for (int c = 0; c < a.c; ++c) sum += ld(px + c) * ld(pw + c * a.o);
        }
    }
    st(y + i, epilogue(sum, pixel, o));
}

template <class T>
KERNEL_BOUNDS(kThreads, 1) direct_input_grad(ConvSize a, T* x, const T* w, const T* y) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= unsigned(a.n * a.h * a.w * a.c) && !MUTANT(121, "direct input gradient: threads past the end return")) return;
    const int c = i % a.c, pixel = i / a.c, v = pixel % a.w, h = pixel / a.w % a.h, n = pixel / a.w / a.h;
    T sum = 0;
    for (int r = 0; r < a.kh; ++r) {
        const int down = h + a.top - r, p = down / a.sh;
        if (down < 0 && !MUTANT(122, "direct input gradient: no output row lies above the first")) continue;
        if (p >= a.p && !MUTANT(123, "direct input gradient: no output row lies below the last")) continue;
        if (down % a.sh && !MUTANT(124, "direct input gradient: a stride skips rows")) continue;
        for (int s = 0; s < a.kw; ++s) {
            const int right = v + a.left - s, q = right / a.sw;
            if (right < 0 && !MUTANT(125, "direct input gradient: no output column lies left of the first")) continue;
            if (q >= a.q && !MUTANT(126, "direct input gradient: no output column lies right of the last")) continue;
            if (right % a.sw && !MUTANT(127, "direct input gradient: a stride skips columns")) continue;
            const T* py = y + ((n * a.p + p) * a.q + q) * a.o;
            const T* pw = w + ((r * a.kw + s) * a.c + c) * a.o;
            for (int o = 0; o < a.o; ++o) sum += ld(py + o) * ld(pw + o);
        }
    }
    st(x + i, sum);
}

template <class T>
KERNEL_BOUNDS(kThreads, 1) direct_weight_grad(ConvSize a, const T* x, T* result, const T* y, int pixels_per_part) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x, count = a.kh * a.kw * a.c * a.o;
    if (i >= count && !MUTANT(131, "direct weight gradient: threads past the end return")) return;
    const int o = i % a.o, c = i / a.o % a.c, s = i / a.o / a.c % a.kw, r = i / a.o / a.c / a.kw;
    const int first = blockIdx.y * pixels_per_part;
    int last = min(first + pixels_per_part, a.n * a.p * a.q);
    if (MUTANT(132, "direct weight gradient: the last part ends with the image")) last = first + pixels_per_part;
    T sum = 0;
    for (int pixel = first; pixel < last; ++pixel) {
        const int q = pixel % a.q, p = pixel / a.q % a.p, n = pixel / a.q / a.p;
        const int h = p * a.sh - a.top + r, v = q * a.sw - a.left + s;
        if (h < 0 && !MUTANT(133, "direct weight gradient: rows above the image are zeros")) continue;
        if (h >= a.h && !MUTANT(134, "direct weight gradient: rows below the image are zeros")) continue;
        if (v < 0 && !MUTANT(135, "direct weight gradient: columns left of the image are zeros")) continue;
        if (v >= a.w && !MUTANT(136, "direct weight gradient: columns right of the image are zeros")) continue;
        sum += ld(x + ((n * a.h + h) * a.w + v) * a.c + c) * ld(y + pixel * a.o + o);
    }
    st(result + size_t(blockIdx.y) * count + i, sum);
}

static int split_of(const ConvCall& call) {
    const ConvSize& s = call.size;
    return split_for(call, ceil_div(s.kh * s.kw * s.c * s.o, kThreads), 1);
}

template <class T>
static int launch(const ConvCall& call) {
    const ConvSize& s = call.size;
    T *x = static_cast<T*>(call.x), *w = static_cast<T*>(call.w), *y = static_cast<T*>(call.y);
    if (call.direction == kForward) {
        const int blocks = ceil_div(s.n * s.p * s.q * s.o, kThreads);
        return LAUNCH(direct_forward<T>, blocks, kThreads, 0, call.stream, s, epilogue_of<T>(call), x, w, y);
    }
    if (call.direction == kInputGrad)
        return LAUNCH(direct_input_grad<T>, ceil_div(s.n * s.h * s.w * s.c, kThreads), kThreads, 0, call.stream, s, x, w, y);
    const int split = split_of(call), part = ceil_div(s.n * s.p * s.q, split);
    T* result = split == 1 ? w : static_cast<T*>(call.workspace);
    const dim3 grid(ceil_div(s.kh * s.kw * s.c * s.o, kThreads), split);
    if (int error = LAUNCH(direct_weight_grad<T>, grid, kThreads, 0, call.stream, s, x, result, y, part)) return error;
    return split == 1 ? 0 : launch_splitk_reduce<T>(call, result, split);
}

int conv_direct(const ConvCall& call) {
    if (call.precision == kFloat64) return launch<double>(call);
    return call.precision == kFloat32 ? launch<float>(call) : kUnsupported;
}

int64_t conv_direct_workspace(const ConvCall& call) {
    if (call.direction != kWeightGrad) return 0;
    return split_workspace(call, split_of(call), call.precision == kFloat64 ? 8 : 4);
}
