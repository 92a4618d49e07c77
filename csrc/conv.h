// What all convolutions share: small arithmetic, and the epilogue, which turns a sum into what is stored.
#pragma once

#include "kernels.h"
#include "launch.h"

struct ConvSize {
    int n, h, w, c, o, kh, kw, p, q, sh, sw, top, left;
};

// One call of conv2d (kernels.h).
struct ConvCall {
    int direction, precision;
    ConvSize size;
    int split, bias_per_sample, activation;
    const void *bias, *residual;
    void *before, *x, *w, *y, *workspace;
    uintptr_t stream;
};

// Each version: launches, or returns kUnsupported; and the bytes of workspace it needs (then only sizes are given).
int conv_direct(const ConvCall& call);
int64_t conv_direct_workspace(const ConvCall& call);
int conv_small_c(const ConvCall& call);
int64_t conv_small_c_workspace(const ConvCall& call);
int conv_igemm_simt(const ConvCall& call);
int64_t conv_igemm_simt_workspace(const ConvCall& call);
int conv_igemm_simt_64(const ConvCall& call);
int64_t conv_igemm_simt_64_workspace(const ConvCall& call);
int conv_igemm_async(const ConvCall& call);
int64_t conv_igemm_async_workspace(const ConvCall& call);
int conv_igemm_async_64(const ConvCall& call);
int64_t conv_igemm_async_64_workspace(const ConvCall& call);
int conv_igemm_tc(const ConvCall& call);
int64_t conv_igemm_tc_workspace(const ConvCall& call);
int conv_igemm_tc_64(const ConvCall& call);
int64_t conv_igemm_tc_64_workspace(const ConvCall& call);
int conv_wino_f2(const ConvCall& call);
int64_t conv_wino_f2_workspace(const ConvCall& call);

HOST_DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }

DEVICE float exponential(float x) { return expf(x); }
DEVICE double exponential(double x) { return exp(x); }

template <class T>
DEVICE T activated(T v, int activation) {
    if (activation == kSilu) return v / (T(1) + exponential(-v));
    if (activation == kRelu) return v < T(0) ? T(0) : v;  // NaN stays
    return v;
}

// Applied where a result is still in a register, it spares one pass over memory for each of its parts.
template <class T>
struct Epilogue {
    const T *bias, *residual;
    T* before;  // the activation
    int pixels_per_bias;  // p q where every sample has its own bias, else all pixels
    int channels, activation;

    // Of neighbours, from `channel` on, the sums become what is stored.
    template <int kCount>
    DEVICE void operator()(T (&v)[kCount], int pixel, int channel) const {
        if (bias)
            UNROLL for (int e = 0; e < kCount; ++e) v[e] += ld(bias + (pixel / pixels_per_bias * channels + channel + e));
        if (residual)
            UNROLL for (int e = 0; e < kCount; ++e) v[e] += ld(residual + (pixel * channels + channel + e));
        if (before)
            UNROLL for (int e = 0; e < kCount; ++e) st(before + (pixel * channels + channel + e), v[e]);
        UNROLL for (int e = 0; e < kCount; ++e) v[e] = activated(v[e], activation);
    }
    DEVICE T operator()(T sum, int pixel, int channel) const {
        T v[1] = {sum};
        (*this)(v, pixel, channel);
        return v[0];
    }
};

template <class T>
Epilogue<T> epilogue_of(const ConvCall& call) {
    const ConvSize& s = call.size;
    if (call.direction != kForward) return {};
    const int pixels = s.p * s.q * (call.bias_per_sample ? 1 : s.n);
    return {static_cast<const T*>(call.bias), static_cast<const T*>(call.residual), static_cast<T*>(call.before),
            pixels, s.o, call.activation};
}

inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }
