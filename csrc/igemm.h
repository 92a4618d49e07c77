// Implicit GEMM: all three convolutions as one matrix product whose left and right matrices exist only as addresses.
//
//                     rows                columns   depth (what is summed over)
//   forward           pixels (n, p, q)    o         (r, s, c)
//   input gradient    pixels (n, h, w)    c         (r, s, o)
//   weight gradient   (r, s, c)           o         pixels (n, p, q)
//
// Writing the left matrix out ("im2col") would copy each pixel kh kw times through memory. Instead a loader knows where each
// element lies, and blocks fetch tiles of it straight into shared memory. An address costs divisions if it is computed anew;
// loaders divide once, at their start, and then walk: channels last means that the next element of a row lies `depth` further,
// and only where a row of taps ends is there a jump.
//
// Three walks are enough:
//   Gather   rows of images under taps, neighbours along the depth: left side of forward and input gradient; and the weights of
//            the input gradient, which are rows (c) of taps (r, s) and channels (o).
//   Strided  a plain matrix, neighbours along the columns: weights of the forward pass, y of the weight gradient.
//   Pixels   the depth is pixels, neighbours along the channels: x of the weight gradient.
//
// A strided input gradient falls into sh sw phases (h mod sh, w mod sw): inside one, only every sh-th tap row reaches a pixel,
// and it is the same ones for all. Each phase is an input gradient of stride 1 with those taps; no multiplication by zeros.
// A phase that no tap reaches has depth 0 and writes zeros.
#pragma once

#include "conv.h"

constexpr int kLargestKernel = 16;  // a tap's row and column are bits of one word

// A matrix whose row (n, i, j), column (r, s, c) is base[n step_n + i step_i + j step_j + r down + s right + c], or 0 where
// i scale_h + shift_h + r sign is outside 0 ... limit_h - 1, or the like for j and s.
template <class T>
struct GatherView {
    const T* base;
    int rows, ni, nj, step_n, step_i, step_j;
    int channels, taps_h, taps_w, down, right;
    int scale_h, shift_h, limit_h, scale_w, shift_w, limit_w, sign;
};

// A matrix (depth, columns), `stride` elements from row to row.
template <class T>
struct StridedView {
    const T* base;
    int columns, stride;
};

// A matrix (pixels, (r, s, c)) of x.
template <class T>
struct PixelsView {
    const T* base;
    ConvSize size;
};

// Where row (n, i, j) of the product goes.
template <class T>
struct OutputView {
    T* base;
    int rows, columns, ni, nj, step_n, step_i, step_j;
    HOST_DEVICE size_t offset(int row) const {
        return size_t(row / nj / ni) * step_n + row / nj % ni * step_i + row % nj * step_j;
    }
};

// A loader follows one thread: at one place of the depth, for kEach rows (or columns), kApart from each other.

// Without kPadded all taps are inside.
template <class T, int kEach, int kApart, bool kPadded = true>
struct Gather {
    static constexpr bool kAlongDepth = true;
    static constexpr uint32_t kColumn = 1u << kLargestKernel;
    using View = GatherView<T>;

    const View& view;
    const T* at;              // where the first row has the present place of the depth
    int offset[kEach];        // from it to the others
    uint32_t missing[kEach];  // bit r: tap row r lies outside the image; bit 16 + s: tap column s does
    uint32_t tap;             // the present one's two bits
    int c;

    DEVICE Gather(const View& view, int row, int depth, int) : view(view), at(view.base + depth), tap(1 | kColumn), c(depth) {
        UNROLL for (int k = 0; k < kEach; ++k) {
            const int m = row + k * kApart, n = m / view.nj / view.ni, i = m / view.nj % view.ni, j = m % view.nj;
            offset[k] = n * view.step_n + i * view.step_i + j * view.step_j;
            missing[k] = kPadded ? off_image(i, j) : 0;
            if (m >= view.rows && !MUTANT(301, "gather: rows past the last are zeros")) missing[k] = ~0u;
        }
        at += offset[0];
        UNROLL for (int k = kEach - 1; k >= 0; --k) offset[k] -= offset[0];
        wrap();
    }

    DEVICE uint32_t off_image(int i, int j) const {
        uint32_t taps = 0;
        for (int t = 0; t < view.taps_h; ++t) {
            const int h = i * view.scale_h + view.shift_h + t * view.sign;
            const bool above = h < 0 && !MUTANT(302, "gather: taps above the image are zeros");
            const bool below = h >= view.limit_h && !MUTANT(303, "gather: taps below the image are zeros");
            if (above || below) taps |= 1u << t;
        }
        for (int t = 0; t < view.taps_w; ++t) {
            const int w = j * view.scale_w + view.shift_w + t * view.sign;
            const bool left = w < 0 && !MUTANT(304, "gather: taps left of the image are zeros");
            const bool right = w >= view.limit_w && !MUTANT(305, "gather: taps right of the image are zeros");
            if (left || right) taps |= kColumn << t;
        }
        return taps;
    }

    // Past a tap's last channel: the next tap; past the last of a row of taps: the next row; past the last row: nothing.
    DEVICE void wrap() {
        while (c >= view.channels) {
            c -= view.channels;
            uint32_t r = tap % kColumn, s = (tap - r) << 1;
            int jump = view.right - view.channels;
            if (s == kColumn << view.taps_w) {
                s = kColumn;
                r <<= 1;
                jump += view.down - view.taps_w * view.right;
                if (r >> view.taps_h && !MUTANT(306, "gather: the depth ends with the last tap")) {
                    r = 0;
                    UNROLL for (int k = 0; k < kEach; ++k) missing[k] = ~0u;
                }
            }
            tap = r | s;
            at += jump;
        }
    }

    DEVICE void advance(int step) {
        c += step;
        at += step;
        if (c >= view.channels) wrap();
    }
    DEVICE bool valid(int k) const { return !(missing[k] & tap); }
    DEVICE const T* source(int k) const { return at + offset[k]; }
};

template <class T, int kEach, int kApart>
struct Strided {
    static constexpr bool kAlongDepth = false;
    using View = StridedView<T>;

    const View& view;
    int at, columns, depth;  // what is left of the columns and of the depth, from here on; no depth without a column

    DEVICE Strided(const View& view, int column, int depth, int end)
        : view(view), at(depth * view.stride + column), columns(view.columns - column), depth(inside(0) ? end - depth : 0) {}

    DEVICE void advance(int step) {
        depth -= step;
        at += step * view.stride;
    }
    DEVICE bool inside(int k) const { return columns > k * kApart || MUTANT(312, "strided: columns past the last are zeros"); }
    DEVICE bool valid(int k) const {
        return (depth > 0 || MUTANT(311, "strided: the depth has an end")) && (k == 0 || inside(k));
    }
    DEVICE const T* source(int k) const { return view.base + (at + k * kApart); }
};

template <class T, int kEach, int kApart>
struct Pixels {
    static constexpr bool kAlongDepth = false;
    using View = PixelsView<T>;

    const View& view;
    int at, h, w;  // of the present pixel: where the first column has it, and its first tap
    int depth;     // that is left, from here on
    int r[kEach], s[kEach], offset[kEach];  // the columns' taps, and the way from the first column to them

    DEVICE Pixels(const View& view, int column, int depth, int end) : view(view), depth(end - depth) {
        const ConvSize& a = view.size;
        const int n = depth / a.q / a.p;
        h = depth / a.q % a.p * a.sh - a.top;
        w = depth % a.q * a.sw - a.left;
        at = ((n * a.h + h) * a.w + w) * a.c;
        UNROLL for (int k = 0; k < kEach; ++k) {
            const int m = column + k * kApart;
            s[k] = m / a.c % a.kw;
            r[k] = m / a.c / a.kw;
            offset[k] = (r[k] * a.w + s[k]) * a.c + m % a.c;
        }
        at += offset[0];
        UNROLL for (int k = kEach - 1; k >= 0; --k) offset[k] -= offset[0];
    }

    DEVICE void advance(int step) {
        const ConvSize& a = view.size;
        depth -= step;
        w += step * a.sw;
        at += step * a.sw * a.c;
        while (w >= a.q * a.sw - a.left) {
            w -= a.q * a.sw;
            h += a.sh;
            at += (a.sh * a.w - a.q * a.sw) * a.c;
            if (h == a.p * a.sh - a.top) {
                h = -a.top;
                at += (a.h - a.p * a.sh) * a.w * a.c;
            }
        }
    }
    DEVICE bool valid(int k) const {  // past the last tap too: those columns are not stored
        const int i = h + r[k], j = w + s[k];
        const bool there = depth > 0 || MUTANT(321, "pixels: the depth has an end");
        const bool row = unsigned(i) < unsigned(view.size.h) ||
                         (i < 0 && MUTANT(323, "pixels: rows above the image are zeros")) ||
                         (i >= view.size.h && MUTANT(324, "pixels: rows below the image are zeros"));
        const bool column = unsigned(j) < unsigned(view.size.w) ||
                            (j < 0 && MUTANT(325, "pixels: columns left of the image are zeros")) ||
                            (j >= view.size.w && MUTANT(326, "pixels: columns right of the image are zeros"));
        return there & row & column;  // without branches
    }
    DEVICE const T* source(int k) const { return view.base + (at + offset[k]); }
};

// How kThreads threads share out a tile, kExtent rows (or columns) by kDepth: neighbouring threads take neighbouring chunks of
// kChunk elements, along the depth all of it, across it at least 128 bytes, which fill the 32 banks of shared memory. A thread
// takes kEach chunks, kApart from each other, at each of kPlaces of the depth, kStep from each other.
template <class T, int kThreads, int kExtent, int kDepth, int kChunk, bool kAlongDepth>
struct Portion {
    static constexpr int kLine = 128 / int(kChunk * sizeof(T)), kFewest = kThreads / kDepth;
    static constexpr int kAcross = kAlongDepth ? kFewest * kChunk : kFewest > kLine ? kFewest : kLine;
    static constexpr int kDeep = kThreads / kAcross, kStep = kAlongDepth ? kDepth : kDeep, kPlaces = kDepth / kStep;
    static constexpr int kApart = kAlongDepth ? kAcross : kAcross * kChunk, kEach = kExtent / kApart;
    static_assert(kEach * kApart == kExtent && kPlaces * kStep == kDepth, "all threads have as many chunks");
    int at, depth;  // of the first

    DEVICE Portion(int thread)
        : at(kAlongDepth ? thread / kDeep : thread % kAcross * kChunk),
          depth(kAlongDepth ? thread % kDeep * kChunk : thread / kAcross) {}
};

// The product that a direction is. `z` is the phase of an input gradient, or the part of a weight gradient. X, W, Y are what
// the operands are stored as (the tensor cores' inputs may be bfloat16), and T is what the result is.
template <class In, class T, int kDirection>
struct Product;

template <class In, class T>
struct Product<In, T, kForward> {
    template <int kEach, int kApart>
    using Left = Gather<In, kEach, kApart>;
    template <int kEach, int kApart>
    using Right = Strided<In, kEach, kApart>;
    GatherView<In> left;
    StridedView<In> right;
    OutputView<T> out;
    int begin = 0, end;

    HOST_DEVICE Product(const ConvSize& a, const In* x, const In* w, T* y, int, int)
        : left{x - (a.top * a.w + a.left) * a.c, a.n * a.p * a.q, a.p, a.q, a.h * a.w * a.c, a.sh * a.w * a.c, a.sw * a.c,
               a.c, a.kh, a.kw, a.w * a.c, a.c, a.sh, -a.top, a.h, a.sw, -a.left, a.w, 1},
          right{w, a.o, a.o},
          out{y, a.n * a.p * a.q, a.o, a.p, a.q, a.p * a.q * a.o, a.q * a.o, a.o},
          end(a.kh * a.kw * a.c) {}
};

template <class In, class T>
struct Product<In, T, kInputGrad> {
    template <int kEach, int kApart>
    using Left = Gather<In, kEach, kApart>;
    template <int kEach, int kApart>
    using Right = Gather<In, kEach, kApart, false>;
    GatherView<In> left, right;
    OutputView<T> out;
    int begin = 0, end;

    HOST_DEVICE Product(const ConvSize& a, const In* y, const In* w, T* x, int phase, int) {
        const int fh = phase / a.sw, fw = phase % a.sw;                         // pixels h = fh + i sh, w = fw + j sw
        const int ni = max(0, ceil_div(a.h - fh, a.sh)), nj = max(0, ceil_div(a.w - fw, a.sw));
        const int r0 = (fh + a.top) % a.sh, s0 = (fw + a.left) % a.sw;          // the taps that reach them: r0 + t sh, ...
        const int kh = max(0, ceil_div(a.kh - r0, a.sh)), kw = max(0, ceil_div(a.kw - s0, a.sw));
        const int p0 = (fh + a.top - r0) / a.sh, q0 = (fw + a.left - s0) / a.sw;  // p = p0 + i - t
        left = {y + (p0 * a.q + q0) * a.o, a.n * ni * nj, ni, nj, a.p * a.q * a.o, a.q * a.o, a.o,
                a.o, kh, kw, -a.q * a.o, -a.o, 1, p0, a.p, 1, q0, a.q, -1};
        right = {w + (r0 * a.kw + s0) * a.c * a.o, a.c, 1, 1, a.o, 0, 0,
                 a.o, kh, kw, a.sh * a.kw * a.c * a.o, a.sw * a.c * a.o, 0, 0, 0, 0, 0, 0, 0};
        out = {x + (fh * a.w + fw) * a.c, a.n * ni * nj, a.c, ni, nj, a.h * a.w * a.c, a.sh * a.w * a.c, a.sw * a.c};
        end = kh * kw * a.o;
    }
};

template <class In, class T>
struct Product<In, T, kWeightGrad> {
    template <int kEach, int kApart>
    using Left = Pixels<In, kEach, kApart>;
    template <int kEach, int kApart>
    using Right = Strided<In, kEach, kApart>;
    PixelsView<In> left;
    StridedView<In> right;
    OutputView<T> out;
    int begin, end;

    HOST_DEVICE Product(const ConvSize& a, const In* x, const In* y, T* parts, int part, int pixels)
        : left{x, a},
          right{y, a.o, a.o},
          out{parts + size_t(part) * a.kh * a.kw * a.c * a.o, a.kh * a.kw * a.c, a.o, 1, 1, a.o, 0, 0},
          begin(part * pixels),
          end(min((part + 1) * pixels, a.n * a.p * a.q)) {}
};

// Rows, columns and independent products (phases, parts) of a direction: what the grid must cover.
inline dim3 igemm_grid(const ConvCall& call, int tile_rows, int tile_columns, int split) {
    const ConvSize& a = call.size;
    int rows = a.n * a.p * a.q, columns = a.o, products = 1;
    if (call.direction == kInputGrad) {
        rows = a.n * ceil_div(a.h, a.sh) * ceil_div(a.w, a.sw);
        columns = a.c;
        products = a.sh * a.sw;
    } else if (call.direction == kWeightGrad) {
        rows = a.kh * a.kw * a.c;
        products = split;
    }
    return dim3(ceil_div(rows, tile_rows), ceil_div(columns, tile_columns), products);
}

inline bool igemm_takes(const ConvSize& a) {
    return max(a.kh, a.kw) <= kLargestKernel && min(min(a.c, a.o), min(a.kh, a.kw)) > 0;
}

// Whether 16 bytes of an operand always belong to one tap and lie at a multiple of 16.
inline bool igemm_wide(const ConvCall& call, int chunk) {
    const ConvSize& a = call.size;
    return a.c % chunk == 0 && a.o % chunk == 0 && aligned16(call.x) && aligned16(call.w) && aligned16(call.y);
}
