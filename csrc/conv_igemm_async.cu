// igemm_async: the tiled product with asynchronous copies. Chapter four; needs sm_80.
//
// Computes: what igemm_simt does, in float32, where c and o are multiples of 4 and arrays lie at multiples of 16 bytes.
// Tiling: the same 128 x 128 x 8 in a ring of four tiles, and 64 x 64 x 16 in one of three.
// Bound by: the multipliers.
// What changed: in igemm_simt the next tile waits in registers while the present one is multiplied: one step of latency is
//   hidden, and the registers are gone. cp.async writes to shared memory itself, so three tiles can be on their way; no loop
//   instruction stores to shared memory, and padding is a copy of nothing, which arrives as zeros.
//   Nothing is transposed any more on the way in: an operand whose neighbours lie along the depth stays so (rows of 8 + 4 or
//   16 + 4 floats), and a thread reads 4 steps of depth of a row at once. Its rows are then 16 apart, because rows side by side,
//   48 or 80 bytes from each other, fall into different banks. Four steps of both factors take 64 registers: one block of 256
//   threads a multiprocessor (two of 64 x 64); its latency is hidden by the ring, not by other blocks.
#include "async.h"
#include "simt.h"
#include "splitk_reduce.h"

// As much depth on its way in both.
template <class Tile>
constexpr int kStages = Tile::kDepth == 8 ? 4 : 3;

// One operand's tile, and a thread's share of it: kEach rows (or columns).
template <bool kAlongDepth, int kExtent, int kDepth, int kEach>
struct Share;

template <int kExtent, int kDepth, int kEach>
struct Share<true, kExtent, kDepth, kEach> {
    using Layout = Padded<kDepth, 4>;
    static constexpr int kSize = Layout::size(kExtent);
    static DEVICE int row(int at, int i) { return at + i * (kExtent / kEach); }
    static DEVICE void read(const float* tile, int at, int k, float (&v)[4][kEach]) {  // depth k ... k + 3
        UNROLL for (int i = 0; i < kEach; ++i) {
            float four[4];
            lds4(tile + Layout::place(row(at, i), k), four);
            UNROLL for (int e = 0; e < 4; ++e) v[e][i] = four[e];
        }
    }
};

template <int kExtent, int kDepth, int kEach>
struct Share<false, kExtent, kDepth, kEach> {
    using Layout = Padded<kExtent, 0>;
    static constexpr int kSize = Layout::size(kDepth);
    static DEVICE int row(int at, int i) { return at * 4 + i / 4 * (kExtent / (kEach / 4)) + i % 4; }
    static DEVICE void read(const float* tile, int at, int k, float (&v)[4][kEach]) {
        UNROLL for (int e = 0; e < 4; ++e)
            UNROLL for (int i = 0; i < kEach; i += 4) lds4(tile + Layout::place(k + e, row(at, i)), v[e] + i);
    }
};

template <class Tile, class P>
struct Shares {
    using Left = Share<P::template Left<1, 1>::kAlongDepth, Tile::kRows, Tile::kDepth, Tile::kRowsEach>;
    using Right = Share<P::template Right<1, 1>::kAlongDepth, Tile::kColumns, Tile::kDepth, Tile::kColumnsEach>;
    struct Storage {
        alignas(16) float left[kStages<Tile>][Left::kSize];
        alignas(16) float right[kStages<Tile>][Right::kSize];
    };
};

template <class Tile, int kDirection>
KERNEL_BOUNDS(Tile::kThreads, 1)
igemm_async(ConvSize size, Epilogue<float> epilogue, const float* one, const float* other, float* result, int pixels) {
    using P = Product<float, float, kDirection>;
    using S = Shares<Tile, P>;
    using Left = typename S::Left;
    using Right = typename S::Right;
    using Storage = typename S::Storage;
    SHARED(Storage, shared);
    const P product(size, one, other, result, blockIdx.z, pixels);
    const int first_row = blockIdx.x * Tile::kRows, first_column = blockIdx.y * Tile::kColumns;
    if (first_row >= product.out.rows) return;  // a phase with fewer pixels than the largest
    const int thread = threadIdx.x, down = thread / Tile::kAcross, across = thread % Tile::kAcross;
    constexpr int kM = Tile::kRowsEach, kN = Tile::kColumnsEach, kDepth = Tile::kDepth;

    AsyncStaging<float, Tile::kThreads, kDepth, Tile::kRows, P::template Left, typename Left::Layout> left(
        product.left, first_row, thread, product.begin, product.end);
    AsyncStaging<float, Tile::kThreads, kDepth, Tile::kColumns, P::template Right, typename Right::Layout> right(
        product.right, first_column, thread, product.begin, product.end);
    float sum[kM][kN];
    UNROLL for (int i = 0; i < kM; ++i)
        UNROLL for (int j = 0; j < kN; ++j) sum[i][j] = 0;

    const auto issue = [&](int stage) {
        left.issue(shared.left[stage]);
        right.issue(shared.right[stage]);
    };
    const auto multiply = [&](int stage) {
        UNROLL for (int k = 0; k < kDepth; k += 4) {
            float a[4][kM], b[4][kN];
            Left::read(shared.left[stage], down, k, a);
            Right::read(shared.right[stage], across, k, b);
            UNROLL for (int e = 0; e < 4; ++e)
                UNROLL for (int i = 0; i < kM; ++i)
                    UNROLL for (int j = 0; j < kN; ++j) sum[i][j] += a[e][i] * b[e][j];
        }
    };
    async_pipeline<kStages<Tile>>(ceil_div(product.end - product.begin, kDepth), issue, multiply);

    const Epilogue<float> used = kDirection == kForward ? epilogue : Epilogue<float>{};
    UNROLL for (int i = 0; i < kM; ++i) {
        const int row = first_row + Left::row(down, i);
        if (row >= product.out.rows && !MUTANT(411, "igemm_async: rows past the last are not stored")) continue;
        if (kDirection != kInputGrad) {
            UNROLL for (int j = 0; j < kN; j += 4) {
                float four[4] = {sum[i][j], sum[i][j + 1], sum[i][j + 2], sum[i][j + 3]};
                StoreFours<float, true>{product.out, used}(row, first_column + Right::row(across, j), four);
            }
        } else {
            float* p = product.out.base + product.out.offset(row);
            UNROLL for (int j = 0; j < kN; ++j) {
                const int column = first_column + Right::row(across, j);
                if (column < product.out.columns || MUTANT(412, "igemm_async: columns past the last are not stored"))
                    st(p + column, sum[i][j]);
            }
        }
    }
}

template <class Tile>
static int split_of(const ConvCall& call) {
    if (call.direction != kWeightGrad) return 1;
    const dim3 grid = igemm_grid(call, Tile::kRows, Tile::kColumns, 1);
    return split_for(call, grid.x * grid.y, Tile::kDepth);
}

template <class Tile, int kDirection>
static int launch(const ConvCall& call, const void* one, const void* other, void* result, int split, int pixels) {
    using Storage = typename Shares<Tile, Product<float, float, kDirection>>::Storage;
    const dim3 grid = igemm_grid(call, Tile::kRows, Tile::kColumns, split);
    return LAUNCH((igemm_async<Tile, kDirection>), grid, Tile::kThreads, sizeof(Storage), call.stream, call.size,
                  epilogue_of<float>(call), static_cast<const float*>(one), static_cast<const float*>(other),
                  static_cast<float*>(result), pixels);
}

template <class Tile>
static int launch(const ConvCall& call) {
    if (!igemm_takes(call.size) || !igemm_wide(call, 4) || call.precision != kFloat32) return kUnsupported;
    if (call.direction == kForward) return launch<Tile, kForward>(call, call.x, call.w, call.y, 1, 0);
    if (call.direction == kInputGrad) return launch<Tile, kInputGrad>(call, call.y, call.w, call.x, 1, 0);
    const int steps = ceil_div(call.size.n * call.size.p * call.size.q, Tile::kDepth), split = split_of<Tile>(call);
    const int part = ceil_div(steps, split) * Tile::kDepth;
    float* result = static_cast<float*>(split == 1 ? call.w : call.workspace);
    if (int error = launch<Tile, kWeightGrad>(call, call.x, call.y, result, split, part)) return error;
    return split == 1 ? 0 : launch_splitk_reduce<float>(call, result, split);
}

int conv_igemm_async(const ConvCall& call) { return launch<LargeTile>(call); }
int conv_igemm_async_64(const ConvCall& call) { return launch<SmallTile>(call); }
int64_t conv_igemm_async_workspace(const ConvCall& call) { return split_workspace(call, split_of<LargeTile>(call), 4); }
int64_t conv_igemm_async_64_workspace(const ConvCall& call) { return split_workspace(call, split_of<SmallTile>(call), 4); }
