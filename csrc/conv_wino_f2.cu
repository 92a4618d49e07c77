// wino_f2: Winograd's convolution F(2x2, 3x3) (Lavin & Gray 2016). Chapter six.
//
// Computes: 3 x 3 convolutions of stride 1, forward and input gradient (a forward convolution of y with the taps in reverse
//   order and the channels exchanged), float32, any padding and number of channels.
//   Each 2 x 2 square of results comes from a 4 x 4 square d of the image (squares overlap by 2). With
//     B' = 1  0 -1  0      G = 1    0    0       A' = 1 1  1  0
//          0  1  1  0          1/2  1/2  1/2          0 1 -1 -1
//          0 -1  1  0          1/2 -1/2  1/2
//          0  1  0 -1          0    0    1
//   it is A' ((G g G') * (B' d B)) A, summed over channels: 16 multiplications for 4 results instead of 36.
// Tiling: four launches through a workspace of 16 (c o + tiles c + tiles o) floats: weights (a thread each), images (a tile and
//   channel a thread), 16 independent matrix products tiles x c x o by the main loop of igemm_simt, results.
// Bound by: the products where there are many channels; the passes around them move 4 values for each of the image and each
//   result, so below some 64 channels memory eats what the multipliers save.
// What changed: not how the work is done but how much there is: 2.25 times fewer multiplications than any chapter before. The
//   transforms add numbers of like size: the error grows about twice over.
#include "simt.h"

constexpr int kThreads = 256, kPoints = 16;

struct Squares {
    int n, h, w, in, p, q, out, top, left;
    bool reversed;  // weights are (kh, kw, out, in), the last tap first
    HOST_DEVICE int down() const { return (p + 1) / 2; }
    HOST_DEVICE int across() const { return (q + 1) / 2; }
    HOST_DEVICE int count() const { return n * down() * across(); }
};

// transformed (16, in, out)
KERNEL_BOUNDS(kThreads, 1) wino_weights(Squares a, const float* weight, float* transformed) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x, count = a.in * a.out;
    if (i >= count && !MUTANT(601, "wino weights: threads past the end return")) return;
    const int o = i % a.out, c = i / a.out;
    float half[4][3];  // G g
    UNROLL for (int s = 0; s < 3; ++s) {
        float g[3];
        UNROLL for (int r = 0; r < 3; ++r)
            g[r] = a.reversed ? ld(weight + (((2 - r) * 3 + 2 - s) * a.out + o) * a.in + c)
                              : ld(weight + ((r * 3 + s) * a.in + c) * a.out + o);
        half[0][s] = g[0];
        half[1][s] = 0.5f * (g[0] + g[1] + g[2]);
        half[2][s] = 0.5f * (g[0] - g[1] + g[2]);
        half[3][s] = g[2];
    }
    UNROLL for (int r = 0; r < 4; ++r) {
        const float* g = half[r];
        const float row[4] = {g[0], 0.5f * (g[0] + g[1] + g[2]), 0.5f * (g[0] - g[1] + g[2]), g[2]};
        UNROLL for (int s = 0; s < 4; ++s) st(transformed + size_t(r * 4 + s) * count + i, row[s]);
    }
}

// transformed (16, tiles, in)
KERNEL_BOUNDS(kThreads, 1) wino_image(Squares a, const float* image, float* transformed) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x, count = a.count() * a.in;
    if (i >= count && !MUTANT(611, "wino image: threads past the end return")) return;
    const int c = i % a.in, tile = i / a.in, across = a.across(), down = a.down();
    const int first_u = tile / across % down * 2 - a.top, first_v = tile % across * 2 - a.left, n = tile / across / down;
    float half[4][4];  // B' d
    UNROLL for (int s = 0; s < 4; ++s) {
        const int v = first_v + s;
        float d[4];
        UNROLL for (int r = 0; r < 4; ++r) {
            const int u = first_u + r;
            const bool inside = (u >= 0 || MUTANT(612, "wino image: rows above the image are zeros")) &&
                                (u < a.h || MUTANT(613, "wino image: rows below the image are zeros")) &&
                                (v >= 0 || MUTANT(614, "wino image: columns left of the image are zeros")) &&
                                (v < a.w || MUTANT(615, "wino image: columns right of the image are zeros"));
            d[r] = inside ? ld(image + ((n * a.h + u) * a.w + v) * a.in + c) : 0.0f;
        }
        half[0][s] = d[0] - d[2];
        half[1][s] = d[1] + d[2];
        half[2][s] = d[2] - d[1];
        half[3][s] = d[1] - d[3];
    }
    UNROLL for (int r = 0; r < 4; ++r) {
        const float* d = half[r];
        const float row[4] = {d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]};
        UNROLL for (int s = 0; s < 4; ++s) st(transformed + size_t(r * 4 + s) * count + i, row[s]);
    }
}

// One of the 16 products: (tiles, in) x (in, out).
struct PointProduct {
    template <int kEach, int kApart>
    using Left = Gather<float, kEach, kApart, false>;
    template <int kEach, int kApart>
    using Right = Strided<float, kEach, kApart>;
    GatherView<float> left;
    StridedView<float> right;
    OutputView<float> out;
    int begin = 0, end;

    HOST_DEVICE PointProduct(const Squares& a, const float* image, const float* weights, float* result, int point)
        : left{image + size_t(point) * a.count() * a.in, a.count(), 1, 1, a.in, 0, 0, a.in, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0},
          right{weights + size_t(point) * a.in * a.out, a.out, a.out},
          out{result + size_t(point) * a.count() * a.out, a.count(), a.out, 1, 1, a.out, 0, 0},
          end(a.in) {}
};

template <class Tile, bool kWide>
KERNEL_BOUNDS(Tile::kThreads, 2)
wino_products(Squares a, const float* image, const float* weights, float* result) {
    using Storage = SimtStorage<float, Tile>;
    SHARED(Storage, shared);
    const PointProduct product(a, image, weights, result, blockIdx.z);
    const Epilogue<float> none{};
    simt_product<float, Tile, kWide>(shared, product, blockIdx.x * Tile::kRows, blockIdx.y * Tile::kColumns,
                                     StoreFours<float, kWide>{product.out, none});
}

// products (16, tiles, out)
KERNEL_BOUNDS(kThreads, 1) wino_result(Squares a, Epilogue<float> epilogue, const float* products, float* result) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x, count = a.count() * a.out;
    if (i >= count && !MUTANT(621, "wino result: threads past the end return")) return;
    const int o = i % a.out, tile = i / a.out, across = a.across(), down = a.down();
    const int first_p = tile / across % down * 2, first_q = tile % across * 2, n = tile / across / down;
    float half[2][4];  // A' m
    UNROLL for (int s = 0; s < 4; ++s) {
        float m[4];
        UNROLL for (int r = 0; r < 4; ++r) m[r] = ld(products + size_t(r * 4 + s) * count + i);
        half[0][s] = m[0] + m[1] + m[2];
        half[1][s] = m[1] - m[2] - m[3];
    }
    UNROLL for (int r = 0; r < 2; ++r) {
        const float* m = half[r];
        const float row[2] = {m[0] + m[1] + m[2], m[1] - m[2] - m[3]};
        UNROLL for (int s = 0; s < 2; ++s) {
            const bool below = first_p + r >= a.p && !MUTANT(622, "wino result: rows below the result are not stored");
            const bool right = first_q + s >= a.q && !MUTANT(623, "wino result: columns right of the result are not stored");
            if (below || right) continue;
            const int pixel = (n * a.p + first_p + r) * a.q + first_q + s;
            st(result + pixel * a.out + o, epilogue(row[s], pixel, o));
        }
    }
}

static Squares squares_of(const ConvCall& call) {
    const ConvSize& s = call.size;
    if (call.direction == kForward) return {s.n, s.h, s.w, s.c, s.p, s.q, s.o, s.top, s.left, false};
    return {s.n, s.p, s.q, s.o, s.h, s.w, s.c, 2 - s.top, 2 - s.left, true};
}

template <class Tile, bool kWide>
static int launch_products(const ConvCall& call, const Squares& a, const float* image, const float* weights, float* result) {
    const dim3 grid(ceil_div(a.count(), Tile::kRows), ceil_div(a.out, Tile::kColumns), kPoints);
    return LAUNCH((wino_products<Tile, kWide>), grid, Tile::kThreads, sizeof(SimtStorage<float, Tile>), call.stream, a, image,
                  weights, result);
}

int conv_wino_f2(const ConvCall& call) {
    const ConvSize& s = call.size;
    const bool fits = s.kh == 3 && s.kw == 3 && s.sh == 1 && s.sw == 1 && call.direction != kWeightGrad;
    if (!fits || call.precision != kFloat32) return kUnsupported;
    const Squares a = squares_of(call);
    float* weights = static_cast<float*>(call.workspace);
    float* images = weights + size_t(kPoints) * a.in * a.out;
    float* products = images + size_t(kPoints) * a.count() * a.in;
    const float* image = static_cast<const float*>(call.direction == kForward ? call.x : call.y);
    float* result = static_cast<float*>(call.direction == kForward ? call.y : call.x);
    if (int error = LAUNCH(wino_weights, ceil_div(a.in * a.out, kThreads), kThreads, 0, call.stream, a,
                           static_cast<const float*>(call.w), weights))
        return error;
    if (int error = LAUNCH(wino_image, ceil_div(a.count() * a.in, kThreads), kThreads, 0, call.stream, a, image, images))
        return error;
    const bool wide = a.in % 4 == 0 && a.out % 4 == 0 && aligned16(call.workspace), small = a.out <= 64;
    const auto run = small ? (wide ? launch_products<SmallTile, true> : launch_products<SmallTile, false>)
                           : (wide ? launch_products<LargeTile, true> : launch_products<LargeTile, false>);
    if (int error = run(call, a, images, weights, products)) return error;
    return LAUNCH(wino_result, ceil_div(a.count() * a.out, kThreads), kThreads, 0, call.stream, a, epilogue_of<float>(call),
                  products, result);
}

int64_t conv_wino_f2_workspace(const ConvCall& call) {
    const Squares a = squares_of(call);
    return int64_t(kPoints) * 4 * (int64_t(a.in) * a.out + int64_t(a.count()) * (a.in + a.out));
}
