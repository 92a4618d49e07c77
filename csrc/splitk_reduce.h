// splitk_reduce: the last step of a weight gradient whose sum over pixels was cut into parts.
//
// A weight gradient has few results and a long sum for each, so a GPU is only filled if several blocks share one sum.
// Adding their parts with atomics would give another rounding on every run. Here each block writes its part to a workspace
// (split, count), and this kernel adds the parts of each element in one order: the same bits every time.
// Tiling: an element a thread. Bound by memory: split + 1 values for split additions.
#pragma once

#include "conv.h"

template <class T>
KERNEL_BOUNDS(256, 1) splitk_reduce(const T* parts, T* result, int count, int split) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= unsigned(count) && !MUTANT(101, "splitk_reduce: the last block's threads past the end return")) return;
    T sum = ld(parts + i);
    for (int part = 1; part < split; ++part) sum += ld(parts + size_t(part) * count + i);
    st(result + i, sum);
}

template <class T>
int launch_splitk_reduce(const ConvCall& call, const T* parts, int split) {
    const int count = call.size.kh * call.size.kw * call.size.c * call.size.o;
    return LAUNCH(splitk_reduce<T>, ceil_div(count, 256), 256, 0, call.stream, parts, static_cast<T*>(call.w), count, split);
}

// How many parts: as asked, else enough blocks for the largest GPUs (some 500 at work at once) while each part keeps
// enough pixels to be worth a block; never more than there are steps.
inline int split_for(const ConvCall& call, int blocks, int pixels_per_step) {
    const int steps = ceil_div(call.size.n * call.size.p * call.size.q, pixels_per_step);
    const int wanted = call.split > 0 ? call.split : min(ceil_div(512, blocks), min(64, ceil_div(steps, 8)));
    return max(1, min(wanted, steps));
}

inline int64_t split_workspace(const ConvCall& call, int split, int item) {
    const ConvSize& s = call.size;
    return split == 1 ? 0 : int64_t(split) * s.kh * s.kw * s.c * s.o * item;
}
