// igemm_simt: the convolution as a tiled matrix product. Chapter three.
//
// Computes: all three directions (igemm.h says how each is a matrix product), any stride and padding, kernels up to 16 x 16,
//   float32 and float64.
// Tiling: a block of 256 threads computes 128 x 128 results, 8 deep a step; a thread holds 8 x 8 sums in registers, as 2 x 2
//   squares of 4 x 4 that lie 64 apart, so that the 16 bytes which neighbouring lanes read from shared memory lie side by side.
//   Small maps would fill too few blocks: igemm_simt_64 has tiles of 64 x 64, 16 deep, and 128 threads (float64 has only those,
//   8 deep, for its registers). 128 registers a thread let two large blocks share a multiprocessor and hide each other's
//   latency; the input gradient, whose both operands walk over taps, takes more.
// Bound by: the multipliers, as it should be. A step moves 2 x 128 x 8 values for 128 x 128 x 8 multiplications: 64 for each
//   value from memory. Inside a thread, 4 loads of 16 bytes from shared memory feed 64 multiplications.
// What changed: in `direct` each multiplication loads both factors. Here they are loaded into shared memory once a block, into
//   registers once a thread, and used 128 and 8 times. While one tile is multiplied the next one is on its way (two buffers,
//   one barrier a step).
#include "simt.h"
#include "splitk_reduce.h"

template <class T, class Tile, bool kWide, int kDirection>
KERNEL_BOUNDS(Tile::kThreads, sizeof(T) == 4 && kDirection != kInputGrad ? 2 : 1)
igemm_simt(ConvSize size, Epilogue<T> epilogue, const T* one, const T* other, T* result, int pixels) {
    using Storage = SimtStorage<T, Tile>;
    SHARED(Storage, shared);
    const Product<T, T, kDirection> product(size, one, other, result, blockIdx.z, pixels);
    const int row = blockIdx.x * Tile::kRows, column = blockIdx.y * Tile::kColumns;
    if (row >= product.out.rows) return;  // a phase with fewer pixels than the largest
    const Epilogue<T> used = kDirection == kForward ? epilogue : Epilogue<T>{};
    simt_product<T, Tile, kWide>(shared, product, row, column, StoreFours<T, kWide>{product.out, used});
}

template <class Tile>
static int split_of(const ConvCall& call) {
    if (call.direction != kWeightGrad) return 1;
    const dim3 grid = igemm_grid(call, Tile::kRows, Tile::kColumns, 1);
    return split_for(call, grid.x * grid.y, Tile::kDepth);
}

template <class T, class Tile, bool kWide>
static int launch(const ConvCall& call) {
    T *x = static_cast<T*>(call.x), *w = static_cast<T*>(call.w), *y = static_cast<T*>(call.y);
    const int split = split_of<Tile>(call), bytes = sizeof(SimtStorage<T, Tile>);
    const dim3 grid = igemm_grid(call, Tile::kRows, Tile::kColumns, split);
    const Epilogue<T> epilogue = epilogue_of<T>(call);
    if (call.direction == kForward)
        return LAUNCH((igemm_simt<T, Tile, kWide, kForward>), grid, Tile::kThreads, bytes, call.stream, call.size, epilogue, x, w,
                      y, 0);
    if (call.direction == kInputGrad)
        return LAUNCH((igemm_simt<T, Tile, kWide, kInputGrad>), grid, Tile::kThreads, bytes, call.stream, call.size, epilogue, y,
                      w, x, 0);
    const int steps = ceil_div(call.size.n * call.size.p * call.size.q, Tile::kDepth), part = ceil_div(steps, split) * Tile::kDepth;
    T* result = split == 1 ? w : static_cast<T*>(call.workspace);
    if (int error = LAUNCH((igemm_simt<T, Tile, kWide, kWeightGrad>), grid, Tile::kThreads, bytes, call.stream, call.size,
                           epilogue, x, y, result, part))
        return error;
    return split == 1 ? 0 : launch_splitk_reduce<T>(call, result, split);
}

template <class T, class Tile>
static int launch(const ConvCall& call) {
    return igemm_wide(call, 4) ? launch<T, Tile, true>(call) : launch<T, Tile, false>(call);
}

template <class Tile>
static int64_t workspace(const ConvCall& call) {
    return split_workspace(call, split_of<Tile>(call), call.precision == kFloat64 ? 8 : 4);
}

int conv_igemm_simt(const ConvCall& call) {
    return igemm_takes(call.size) && call.precision == kFloat32 ? launch<float, LargeTile>(call) : kUnsupported;
}
int64_t conv_igemm_simt_workspace(const ConvCall& call) { return workspace<LargeTile>(call); }

int conv_igemm_simt_64(const ConvCall& call) {
    if (!igemm_takes(call.size)) return kUnsupported;
    if (call.precision == kFloat64) return launch<double, DoubleTile>(call);
    return call.precision == kFloat32 ? launch<float, SmallTile>(call) : kUnsupported;
}
int64_t conv_igemm_simt_64_workspace(const ConvCall& call) {
    return call.precision == kFloat64 ? workspace<DoubleTile>(call) : workspace<SmallTile>(call);
}
