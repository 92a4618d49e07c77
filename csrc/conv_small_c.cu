// small_c: the first and the last layer, where one side has at most four channels. Chapter two.
//
// Computes: forward at any stride, and the input gradient at stride 1, which is a forward convolution of y with the taps in
//   reverse order and the channels exchanged. float32 and float64.
// Tiling: few channels in: 256 threads compute 64 pixels x 64 channels, a thread 4 x 4 of them: 16 multiplications for 4 values
//   of the image and one load of 4 weights from shared memory. Few channels out: a warp computes 4 pixels; its lanes share out
//   the channels of the depth and add up by shuffles.
// Bound by: memory, as it must be: 27 multiplications for each value written in a first layer of 3 x 3 x 3.
// What changed: `direct` fetches a weight for every multiplication. A block's weights (64 channels of at most 192 taps and
//   channels; or all of them) fit in shared memory, and there is the first BARRIER: no thread may read them before all are
//   there. And where the results are too few to give every lane one, lanes cooperate: the first shuffles.
#include "fours.h"
#include "reduce.h"

constexpr int kFew = 4, kThreads = 256, kChannels = 64, kPixels = 64, kSharedBytes = 48 * 1024;

// A convolution of an image with `in` channels to `out` channels, whichever direction it stands for.
struct Small {
    int n, h, w, in, p, q, out, kh, kw, sh, sw, top, left;
    bool reversed;  // weights are (kh, kw, out, in), the last tap first

    DEVICE int weight(int r, int s, int i, int o) const {
        return reversed ? (((kh - 1 - r) * kw + kw - 1 - s) * out + o) * in + i : ((r * kw + s) * in + i) * out + o;
    }
    // The place of the pixel's tap in the image, or -1 outside.
    DEVICE int place(int pixel, int r, int s) const {
        const int v = pixel % q * sw - left + s, u = pixel / q % p * sh - top + r;
        if (u < 0 && !MUTANT(201, "small_c: rows above the image are zeros")) return -1;
        if (u >= h && !MUTANT(202, "small_c: rows below the image are zeros")) return -1;
        if (v < 0 && !MUTANT(203, "small_c: columns left of the image are zeros")) return -1;
        if (v >= w && !MUTANT(204, "small_c: columns right of the image are zeros")) return -1;
        return ((pixel / q / p * h + u) * w + v) * in;
    }
};

template <class T>
struct Weights {
    alignas(16) T value[4];  // as many as the launch asks for
};

template <class T>
KERNEL_BOUNDS(kThreads, 2)
small_c_in(Small a, Epilogue<T> epilogue, const T* image, const T* weight, T* result) {
    SHARED(Weights<T>, shared);
    T* weights = shared.value;  // (kh, kw, in, 64)
    const int first_channel = blockIdx.y * kChannels, depth = a.kh * a.kw * a.in;
    for (int i = threadIdx.x; i < depth * kChannels; i += kThreads) {
        const int o = first_channel + i % kChannels, d = i / kChannels;
        const bool inside = o < a.out || MUTANT(211, "small_c: weights past the last channel are zeros");
        weights[i] = inside ? ld(weight + a.weight(d / a.in / a.kw, d / a.in % a.kw, d % a.in, o)) : T(0);
    }
    if (!MUTANT(212, "small_c: the weights are there before they are read")) BARRIER();

    const int across = threadIdx.x % 16 * 4, first = blockIdx.x * kPixels + threadIdx.x / 16 * 4, pixels = a.n * a.p * a.q;
    T sum[4][4] = {};
    for (int r = 0; r < a.kh; ++r)
        for (int s = 0; s < a.kw; ++s) {
            const T* from[4];
            UNROLL for (int k = 0; k < 4; ++k) {
                const bool inside = first + k < pixels || MUTANT(213, "small_c: pixels past the last are not read");
                const int place = inside ? a.place(first + k, r, s) : -1;
                from[k] = place < 0 ? nullptr : image + place;
            }
            for (int i = 0; i < a.in; ++i) {
                T w[4];
                lds4(weights + ((r * a.kw + s) * a.in + i) * kChannels + across, w);
                UNROLL for (int k = 0; k < 4; ++k) {
                    const T x = from[k] ? ld(from[k] + i) : T(0);
                    UNROLL for (int e = 0; e < 4; ++e) sum[k][e] += x * w[e];
                }
            }
        }
    UNROLL for (int k = 0; k < 4; ++k) {
        if (first + k >= pixels && !MUTANT(214, "small_c: pixels past the last are not stored")) break;
        UNROLL for (int e = 0; e < 4; ++e) {
            const int o = first_channel + across + e;
            if (o < a.out || MUTANT(215, "small_c: channels past the last are not stored"))
                st(result + (first + k) * a.out + o, epilogue(sum[k][e], first + k, o));
        }
    }
}

template <class T>
KERNEL_BOUNDS(kThreads, 2)
small_c_out(Small a, Epilogue<T> epilogue, const T* image, const T* weight, T* result) {
    SHARED(Weights<T>, shared);
    T* weights = shared.value;  // (out, kh, kw, in): lanes read neighbours of the depth
    const int depth = a.kh * a.kw * a.in, lane = threadIdx.x % 32;
    for (int i = threadIdx.x; i < depth * a.out; i += kThreads) {
        const int d = i % depth;
        weights[i] = ld(weight + a.weight(d / a.in / a.kw, d / a.in % a.kw, d % a.in, i / depth));
    }
    if (!MUTANT(221, "small_c: the weights are there before lanes share them")) BARRIER();

    const int first = (blockIdx.x * (kThreads / 32) + threadIdx.x / 32) * 4, pixels = a.n * a.p * a.q;
    T sum[4][kFew] = {};
    for (int r = 0; r < a.kh; ++r)
        for (int s = 0; s < a.kw; ++s)
            UNROLL for (int k = 0; k < 4; ++k) {
                const bool inside = first + k < pixels || MUTANT(222, "small_c: a warp's pixels past the last are not read");
                const int place = inside ? a.place(first + k, r, s) : -1;
                if (place < 0) continue;
                for (int i = lane; i < a.in; i += 32) {
                    const T x = ld(image + place + i);
                    const T* w = weights + (r * a.kw + s) * a.in + i;
                    UNROLL for (int o = 0; o < kFew; ++o)
                        if (o < a.out) sum[k][o] += x * w[o * depth];
                }
            }
    UNROLL for (int k = 0; k < 4; ++k)
        UNROLL for (int o = 0; o < kFew; ++o) {
            UNROLL for (int step = 16; step; step /= 2) sum[k][o] += SHFL_XOR(kWholeWarp, sum[k][o], step);
            // All lanes have all sums now, and each stores one.
            const bool mine = lane == k * kFew + o && o < a.out;
            if (mine && (first + k < pixels || MUTANT(223, "small_c: a warp's pixels past the last are not stored")))
                st(result + (first + k) * a.out + o, epilogue(sum[k][o], first + k, o));
        }
}

template <class T>
static int launch(const ConvCall& call) {
    const ConvSize& s = call.size;
    const T* weight = static_cast<const T*>(call.w);
    Small a{s.n, s.h, s.w, s.c, s.p, s.q, s.o, s.kh, s.kw, s.sh, s.sw, s.top, s.left, false};
    const T* image = static_cast<const T*>(call.x);
    T* result = static_cast<T*>(call.y);
    if (call.direction == kInputGrad) {
        if (s.sh != 1 || s.sw != 1) return kUnsupported;
        a = {s.n, s.p, s.q, s.o, s.h, s.w, s.c, s.kh, s.kw, 1, 1, s.kh - 1 - s.top, s.kw - 1 - s.left, true};
        image = static_cast<const T*>(call.y);
        result = static_cast<T*>(call.x);
    }
    const int depth = a.kh * a.kw * a.in, pixels = a.n * a.p * a.q;
    const int in_bytes = depth * kChannels * sizeof(T), out_bytes = depth * a.out * sizeof(T);
    if (a.in <= kFew && in_bytes <= kSharedBytes)
        return LAUNCH(small_c_in<T>, dim3(ceil_div(pixels, kPixels), ceil_div(a.out, kChannels)), kThreads, in_bytes, call.stream,
                      a, epilogue_of<T>(call), image, weight, result);
    if (a.out <= kFew && out_bytes <= kSharedBytes)
        return LAUNCH(small_c_out<T>, ceil_div(pixels, kThreads / 32 * 4), kThreads, max(out_bytes, int(sizeof(Weights<T>))),
                      call.stream, a, epilogue_of<T>(call), image, weight, result);
    return kUnsupported;
}

int conv_small_c(const ConvCall& call) {
    if (call.direction == kWeightGrad) return kUnsupported;
    if (call.precision == kFloat64) return launch<double>(call);
    return call.precision == kFloat32 ? launch<float>(call) : kUnsupported;
}

int64_t conv_small_c_workspace(const ConvCall&) { return 0; }
