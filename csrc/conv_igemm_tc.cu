// igemm_tc: the tiled product on tensor cores. Chapter five; needs sm_80.
//
// Computes: all three directions, float32 arrays in and out, sums in float32, factors rounded:
//   TF32 (10 bits after the point; c and o multiples of 4). Weights are rounded to nearest, in a pass of their own, once a call.
//     Images go straight from memory to the tensor cores, which ignore the last 13 bits: cut off, not rounded.
//     So a product's relative error is at most 2^-11 for the weight and 2^-10 for the image, the latter always towards zero.
//   bfloat16 (7 bits; c and o multiples of 8). Both factors are rounded to nearest in passes that write them 2 bytes wide:
//     2^-8 in all. Half the bytes through the caches and twice the multiplications an instruction.
// Tiling: a block of 4 warps computes 128 x 128 (or 64 x 64) results, 64 bytes of depth a step (16 floats or 32 bfloat16), in a
//   ring of three tiles; a warp holds a 64 x 64 (32 x 32) quarter as 4 x 8 (2 x 4) fragments of 16 x 8 in registers.
// Bound by: the tensor cores, if memory can follow: 2 x 128 x 64 bytes for 128 x 128 x 16 multiplications.
// What changed: in igemm_async a thread multiplies numbers; here a warp multiplies matrices: m16n8k8 is 1024 multiplications
//   in one instruction, its operands spread over the lanes' registers. So the work left is to bring them there:
//   - an operand along the depth: ldmatrix loads four 8 x 16-byte matrices at once, the layout of the fragments for either type.
//     Its 8 rows lie 64 bytes apart, which would meet in the same banks; so chunk k of row r is kept at place k ^ (r / 2 % 4).
//   - an operand across it: bfloat16 is transposed by ldmatrix (.trans moves 2-byte elements). TF32 can't be, so it is read
//     number by number: 8 floats of padding put the 4 x 8 numbers of a fragment into 32 banks.
#include "async.h"
#include "splitk_reduce.h"

constexpr int kThreads = 128, kStages = 3;

// 64-byte rows of four chunks, changed about so that any 8 neighbouring rows of one chunk lie in different banks.
template <class In>
struct Swizzled {
    static constexpr int kChunk = 16 / sizeof(In), kStride = 4 * kChunk;
    static constexpr HOST_DEVICE int size(int rows) { return rows * kStride; }
    static DEVICE int place(int row, int inner) { return row * kStride + (inner / kChunk ^ (row >> 1 & 3)) * kChunk; }
};

template <class In, bool kAlongDepth, int kExtent>
struct Operand;

template <class In, int kExtent>
struct Operand<In, true, kExtent> {
    using Layout = Swizzled<In>;
    static constexpr int kChunk = Layout::kChunk, kSize = Layout::size(kExtent);

    // Fragments of the half step (2 chunks of depth): kCount of 16 rows, or pairs of 8 columns.
    template <int kCount>
    static DEVICE void left(const In* tile, int first, int half, uint32_t (&a)[kCount][4]) {
        const int lane = threadIdx.x % 32;
        const In* place = tile + first * Layout::kStride + Layout::place(lane % 16, (half * 2 + lane / 16) * kChunk);
        UNROLL for (int i = 0; i < kCount; ++i) ldmatrix_x4(a[i], place + i * 16 * Layout::kStride);
    }
    template <int kCount>
    static DEVICE void right(const In* tile, int first, int half, uint32_t (&b)[kCount][2]) {
        const int lane = threadIdx.x % 32;
        const int column = lane / 16 * 8 + lane % 8, inner = (half * 2 + lane / 8 % 2) * kChunk;
        const In* place = tile + first * Layout::kStride + Layout::place(column, inner);
        UNROLL for (int j = 0; j < kCount; j += 2) {
            uint32_t four[4];
            ldmatrix_x4(four, place + j * 8 * Layout::kStride);
            b[j][0] = four[0], b[j][1] = four[1], b[j + 1][0] = four[2], b[j + 1][1] = four[3];
        }
    }
};

template <int kExtent>
struct Operand<float, false, kExtent> {
    using Layout = Padded<kExtent, 8>;
    static constexpr int kSize = Layout::size(16);

    static DEVICE uint32_t bits(const float* tile, int depth, int at) {
        return __float_as_uint(tile[Layout::place(depth, at)]);
    }
    template <int kCount>
    static DEVICE void left(const float* tile, int first, int half, uint32_t (&a)[kCount][4]) {
        const int lane = threadIdx.x % 32, depth = half * 8 + lane % 4;
        UNROLL for (int i = 0; i < kCount; ++i) {
            const int row = first + i * 16 + lane / 4;
            a[i][0] = bits(tile, depth, row), a[i][1] = bits(tile, depth, row + 8);
            a[i][2] = bits(tile, depth + 4, row), a[i][3] = bits(tile, depth + 4, row + 8);
        }
    }
    template <int kCount>
    static DEVICE void right(const float* tile, int first, int half, uint32_t (&b)[kCount][2]) {
        const int lane = threadIdx.x % 32, depth = half * 8 + lane % 4;
        UNROLL for (int j = 0; j < kCount; ++j) {
            const int column = first + j * 8 + lane / 4;
            b[j][0] = bits(tile, depth, column), b[j][1] = bits(tile, depth + 4, column);
        }
    }
};

template <int kExtent>
struct Operand<uint16_t, false, kExtent> {
    using Layout = Padded<kExtent, 8>;
    static constexpr int kSize = Layout::size(32);

    template <int kCount>
    static DEVICE void left(const uint16_t* tile, int first, int half, uint32_t (&a)[kCount][4]) {
        const int lane = threadIdx.x % 32, depth = half * 16 + lane / 16 * 8 + lane % 8;
        UNROLL for (int i = 0; i < kCount; ++i)
            ldmatrix_x4_trans(a[i], tile + Layout::place(depth, first + i * 16 + lane / 8 % 2 * 8));
    }
    template <int kCount>
    static DEVICE void right(const uint16_t* tile, int first, int half, uint32_t (&b)[kCount][2]) {
        const int lane = threadIdx.x % 32, depth = half * 16 + lane / 8 % 2 * 8 + lane % 8;
        UNROLL for (int j = 0; j < kCount; j += 2) {
            uint32_t four[4];
            ldmatrix_x4_trans(four, tile + Layout::place(depth, first + j * 8 + lane / 16 * 8));
            b[j][0] = four[0], b[j][1] = four[1], b[j + 1][0] = four[2], b[j + 1][1] = four[3];
        }
    }
};

DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], float) { mma_m16n8k8_tf32(d, a, b); }
DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], uint16_t) { mma_m16n8k16_bf16(d, a, b); }

template <class In, int kTile, class P>
struct Operands {
    using Left = Operand<In, P::template Left<1, 1>::kAlongDepth, kTile>;
    using Right = Operand<In, P::template Right<1, 1>::kAlongDepth, kTile>;
    struct Storage {
        alignas(128) In left[kStages][Left::kSize];
        alignas(128) In right[kStages][Right::kSize];
    };
};

template <class In, int kTile, int kDirection>
KERNEL_BOUNDS(kThreads, 1)
igemm_tc(ConvSize size, Epilogue<float> epilogue, const In* one, const In* other, float* result, int pixels) {
    using P = Product<In, float, kDirection>;
    using Left = typename Operands<In, kTile, P>::Left;
    using Right = typename Operands<In, kTile, P>::Right;
    using Storage = typename Operands<In, kTile, P>::Storage;
    constexpr int kDepth = 64 / sizeof(In), kM = kTile / 32, kN = kTile / 16;
    SHARED(Storage, shared);
    const P product(size, one, other, result, blockIdx.z, pixels);
    const int first_row = blockIdx.x * kTile, first_column = blockIdx.y * kTile;
    if (first_row >= product.out.rows) return;  // a phase with fewer pixels than the largest
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int warp_row = warp / 2 * (kTile / 2), warp_column = warp % 2 * (kTile / 2);

    AsyncStaging<In, kThreads, kDepth, kTile, P::template Left, typename Left::Layout> left(product.left, first_row, thread,
                                                                                            product.begin, product.end);
    AsyncStaging<In, kThreads, kDepth, kTile, P::template Right, typename Right::Layout> right(
        product.right, first_column, thread, product.begin, product.end);
    float sum[kM][kN][4];
    UNROLL for (int i = 0; i < kM; ++i)
        UNROLL for (int j = 0; j < kN; ++j)
            UNROLL for (int e = 0; e < 4; ++e) sum[i][j][e] = 0;

    async_pipeline<kStages>(
        ceil_div(product.end - product.begin, kDepth),
        [&](int stage) {
            left.issue(shared.left[stage]);
            right.issue(shared.right[stage]);
        },
        [&](int stage) {
            UNROLL for (int half = 0; half < 2; ++half) {
                uint32_t a[kM][4], b[kN][2];
                Left::left(shared.left[stage], warp_row, half, a);
                Right::right(shared.right[stage], warp_column, half, b);
                UNROLL for (int i = 0; i < kM; ++i)
                    UNROLL for (int j = 0; j < kN; ++j) multiply(sum[i][j], a[i], b[j], In());
            }
        });

    const Epilogue<float> used = kDirection == kForward ? epilogue : Epilogue<float>{};
    // A lane holds two neighbours of row lane / 4, and two of the row 8 below.
    UNROLL for (int i = 0; i < kM; ++i)
        UNROLL for (int e = 0; e < 4; e += 2) {
            const int row = first_row + warp_row + i * 16 + lane / 4 + e * 4;
            if (row >= product.out.rows && !MUTANT(501, "igemm_tc: rows past the last are not stored")) continue;
            float* p = product.out.base + product.out.offset(row);
            UNROLL for (int j = 0; j < kN; ++j) {
                const int column = first_column + warp_column + j * 8 + lane % 4 * 2;
                if (column >= product.out.columns && !MUTANT(502, "igemm_tc: columns past the last are not stored")) continue;
                st(reinterpret_cast<float2*>(p + column),
                   make_float2(used(sum[i][j][e], row, column), used(sum[i][j][e + 1], row, column + 1)));
            }
        }
}

// The passes before: 8 values a thread, bound by memory.
KERNEL_BOUNDS(256, 1) round_tf32(const float* x, float* rounded, int fours) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= unsigned(fours) && !MUTANT(511, "round_tf32: threads past the end return")) return;
    const float4 v = load128(x + i * 4);
    store128(rounded + i * 4, make_uint4(to_tf32(v.x), to_tf32(v.y), to_tf32(v.z), to_tf32(v.w)));
}

KERNEL_BOUNDS(256, 1) pack_bf16(const float* x, uint16_t* packed, int eights) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= unsigned(eights) && !MUTANT(512, "pack_bf16: threads past the end return")) return;
    const float4 a = load128(x + i * 8), b = load128(x + i * 8 + 4);
    store128(packed + i * 8,
             make_uint4(pack_bf16x2(a.x, a.y), pack_bf16x2(a.z, a.w), pack_bf16x2(b.x, b.y), pack_bf16x2(b.z, b.w)));
}

struct Array {
    const void* data;
    int64_t count;
};

// What a direction reads, left and right factor, and which passes they go through first.
struct Plan {
    Array left, right;
    bool rounds_left, rounds_right;
    int split, pixels;
    int64_t left_bytes, right_bytes, part_bytes;
};

static int64_t up(int64_t bytes) { return (bytes + 255) / 256 * 256; }

template <int kTile>
static Plan plan(const ConvCall& call) {
    const ConvSize& a = call.size;
    const Array x{call.x, int64_t(a.n) * a.h * a.w * a.c}, y{call.y, int64_t(a.n) * a.p * a.q * a.o};
    const Array w{call.w, int64_t(a.kh) * a.kw * a.c * a.o};
    const bool narrow = call.precision == kBF16, weight = call.direction == kWeightGrad;
    Plan plan{call.direction == kInputGrad ? y : x, weight ? y : w, narrow, narrow || !weight, 1, 0, 0, 0, 0};
    plan.left_bytes = plan.rounds_left ? up(plan.left.count * 2) : 0;
    plan.right_bytes = plan.rounds_right ? up(plan.right.count * (narrow ? 2 : 4)) : 0;
    if (weight) {
        const int depth = narrow ? 32 : 16;
        const dim3 grid = igemm_grid(call, kTile, kTile, 1);
        plan.split = split_for(call, grid.x * grid.y, depth);
        plan.pixels = ceil_div(ceil_div(a.n * a.p * a.q, depth), plan.split) * depth;
        plan.part_bytes = split_workspace(call, plan.split, 4);
    }
    return plan;
}

template <class In, int kTile, int kDirection>
static int launch(const ConvCall& call, const Plan& plan, const void* left, const void* right, void* result) {
    using Storage = typename Operands<In, kTile, Product<In, float, kDirection>>::Storage;
    return LAUNCH((igemm_tc<In, kTile, kDirection>), igemm_grid(call, kTile, kTile, plan.split), kThreads, sizeof(Storage),
                  call.stream, call.size, epilogue_of<float>(call), static_cast<const In*>(left), static_cast<const In*>(right),
                  static_cast<float*>(result), plan.pixels);
}

static int prepare(const ConvCall& call, const Array& array, void* rounded) {
    const float* x = static_cast<const float*>(array.data);
    if (call.precision == kBF16)
        return LAUNCH(pack_bf16, ceil_div(array.count / 8, 256), 256, 0, call.stream, x, static_cast<uint16_t*>(rounded),
                      int(array.count / 8));
    return LAUNCH(round_tf32, ceil_div(array.count / 4, 256), 256, 0, call.stream, x, static_cast<float*>(rounded),
                  int(array.count / 4));
}

template <class In, int kTile>
static int launch(const ConvCall& call) {
    if (!igemm_takes(call.size) || !igemm_wide(call, 16 / sizeof(In)) || !aligned16(call.workspace)) return kUnsupported;
    const Plan p = plan<kTile>(call);
    char* space = static_cast<char*>(call.workspace);
    const void *left = p.left.data, *right = p.right.data;
    if (p.rounds_left) {
        if (int error = prepare(call, p.left, space)) return error;
        left = space;
    }
    if (p.rounds_right) {
        if (int error = prepare(call, p.right, space + p.left_bytes)) return error;
        right = space + p.left_bytes;
    }
    if (call.direction == kForward) return launch<In, kTile, kForward>(call, p, left, right, call.y);
    if (call.direction == kInputGrad) return launch<In, kTile, kInputGrad>(call, p, left, right, call.x);
    void* parts = space + p.left_bytes + p.right_bytes;
    if (int error = launch<In, kTile, kWeightGrad>(call, p, left, right, p.split == 1 ? call.w : parts)) return error;
    return p.split == 1 ? 0 : launch_splitk_reduce<float>(call, static_cast<const float*>(parts), p.split);
}

template <int kTile>
static int launch(const ConvCall& call) {
    if (call.precision == kTF32) return launch<float, kTile>(call);
    return call.precision == kBF16 ? launch<uint16_t, kTile>(call) : kUnsupported;
}

template <int kTile>
static int64_t workspace(const ConvCall& call) {
    const Plan p = plan<kTile>(call);
    return p.left_bytes + p.right_bytes + p.part_bytes;
}

int conv_igemm_tc(const ConvCall& call) { return launch<128>(call); }
int conv_igemm_tc_64(const ConvCall& call) { return launch<64>(call); }
int64_t conv_igemm_tc_workspace(const ConvCall& call) { return workspace<128>(call); }
int64_t conv_igemm_tc_64_workspace(const ConvCall& call) { return workspace<64>(call); }
