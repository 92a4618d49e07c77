// For tests/test_cuda_loaders.py: where the loaders of igemm.h go. Arrays hold their own indices plus 1, so that a value tells
// where it was read, and 0 that it was not.
#include "igemm.h"

constexpr int kRows = 3, kApart = 5;

struct Walk {
    int first, depth, step, steps;  // begins at row or column `first`, place `depth`
};

// The addresses of each step: of 16 bytes at a time (one a row, -1: zeros), and one by one (four a row).
template <class Loader>
void follow(const typename Loader::View& view, const double* base, const Walk& walk, int end, int64_t* wide, int64_t* single) {
    Loader loader(view, walk.first, walk.depth, end);
    for (int i = 0; i < walk.steps; ++i) {
        for (int k = 0; k < kRows; ++k) {
            *wide++ = loader.valid(k) ? loader.source(k) - base : -1;
            double four[4];
            loader.fetch(k, four);
            for (double value : four) *single++ = int64_t(value) - 1;
        }
        loader.advance(walk.step);
    }
}

template <int kDirection>
void follow(const ConvSize& size, const double* one, const double* other, double* result, int z, int pixels, int side,
            const Walk& walk, int64_t* extent, int64_t* offsets, int64_t* wide, int64_t* single) {
    using P = Product<double, double, kDirection>;
    const P product(size, one, other, result, z, pixels);
    const int64_t extents[] = {product.begin, product.end, product.out.rows, product.out.columns};
    for (int i = 0; i < 4; ++i) extent[i] = extents[i];
    for (int row = 0; row < product.out.rows; ++row) offsets[row] = product.out.base + product.out.offset(row) - result;
    if (product.begin >= product.end || product.out.rows == 0) return;  // as a kernel's block does before it makes a loader
    if (side == 0) follow<typename P::template Left<kRows, kApart>>(product.left, one, walk, product.end, wide, single);
    else follow<typename P::template Right<kRows, kApart>>(product.right, other, walk, product.end, wide, single);
}

API void loaders(int direction, const int* n, const double* one, const double* other, double* result, int z, int pixels, int side,
                 const int* w, int64_t* extent, int64_t* offsets, int64_t* wide, int64_t* single) {
    const ConvSize size{n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], n[10], n[11], n[12]};
    const auto go = direction == kForward ? follow<kForward> : direction == kInputGrad ? follow<kInputGrad> : follow<kWeightGrad>;
    go(size, one, other, result, z, pixels, side, {w[0], w[1], w[2], w[3]}, extent, offsets, wide, single);
}
