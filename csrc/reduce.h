// Sums over a warp, in one order for all lanes.
#pragma once

#include "conv.h"

constexpr unsigned kWholeWarp = 0xffffffffu;

template <class T>
DEVICE T warp_sum(T v) {
    UNROLL for (int step = 16; step; step /= 2) v += SHFL_XOR(kWholeWarp, v, step);
    return v;
}
template <class T>
DEVICE T warp_max(T v) {
    UNROLL for (int step = 16; step; step /= 2) {
        const T other = SHFL_XOR(kWholeWarp, v, step);
        v = v < other || other != other ? other : v;  // NaN wins
    }
    return v;
}

DEVICE float logarithm(float x) { return logf(x); }
DEVICE double logarithm(double x) { return log(x); }
DEVICE float inverse_root(float x) { return rsqrtf(x); }
DEVICE double inverse_root(double x) { return rsqrt(x); }

// The derivative of an activation at v.
template <class T>
DEVICE T activation_slope(T v, int activation) {
    if (activation == kSilu) {
        const T s = T(1) / (T(1) + exponential(-v));
        return s * (T(1) + v * (T(1) - s));
    }
    return activation == kRelu && v <= T(0) ? T(0) : T(1);
}
