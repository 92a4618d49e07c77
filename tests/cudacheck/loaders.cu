// For tests/test_cuda_loaders.py: where the loaders of igemm.h go.
#include "igemm.h"

constexpr int kEach = 3, kApart = 5;

struct Walk {
    int first, depth, step, steps;  // begins at row or column `first`, place `depth`
};

// The addresses of each step, one a row (or column); -1: zeros.
template <class Loader>
void follow(const typename Loader::View& view, const double* base, const Walk& walk, int end, int64_t* found) {
    Loader loader(view, walk.first, walk.depth, end);
    for (int i = 0; i < walk.steps; ++i) {
        for (int k = 0; k < kEach; ++k) *found++ = loader.valid(k) ? loader.source(k) - base : -1;
        loader.advance(walk.step);
    }
}

template <int kDirection>
void follow(const ConvSize& size, const double* one, const double* other, double* result, int z, int pixels, int side,
            const Walk& walk, int64_t* extent, int64_t* offsets, int64_t* found) {
    using P = Product<double, double, kDirection>;
    const P product(size, one, other, result, z, pixels);
    const int64_t extents[] = {product.begin, product.end, product.out.rows, product.out.columns};
    for (int i = 0; i < 4; ++i) extent[i] = extents[i];
    for (int row = 0; row < product.out.rows; ++row) offsets[row] = product.out.base + product.out.offset(row) - result;
    if (product.begin >= product.end || product.out.rows == 0) return;  // as a kernel's block does before it makes a loader
    if (side == 0) follow<typename P::template Left<kEach, kApart>>(product.left, one, walk, product.end, found);
    else follow<typename P::template Right<kEach, kApart>>(product.right, other, walk, product.end, found);
}

API void loaders(int direction, const int* n, const double* one, const double* other, double* result, int z, int pixels, int side,
                 const int* w, int64_t* extent, int64_t* offsets, int64_t* found) {
    const ConvSize size{n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], n[10], n[11], n[12]};
    const auto go = direction == kForward ? follow<kForward> : direction == kInputGrad ? follow<kInputGrad> : follow<kWeightGrad>;
    go(size, one, other, result, z, pixels, side, {w[0], w[1], w[2], w[3]}, extent, offsets, found);
}
