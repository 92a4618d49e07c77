// The main loop on the ordinary multipliers (SIMT: each thread its own sums), double buffered. Used by igemm_simt and wino_f2.
#pragma once

#include "fours.h"
#include "igemm.h"

// A block computes kRows x kColumns of the product, a thread kRowsEach x kColumnsEach of it, kDepth deep a step.
template <int kRows_, int kColumns_, int kRowsEach_, int kColumnsEach_, int kDepth_>
struct Tile {
    static constexpr int kRows = kRows_, kColumns = kColumns_, kRowsEach = kRowsEach_, kColumnsEach = kColumnsEach_;
    static constexpr int kDepth = kDepth_;
    static constexpr int kAcross = kColumns / kColumnsEach, kThreads = kRows / kRowsEach * kAcross;
};
using LargeTile = Tile<128, 128, 8, 8, 8>;
using SmallTile = Tile<64, 64, 8, 4, 16>;  // twice as deep: half of the multiplications a step for as many addresses
using DoubleTile = Tile<64, 64, 8, 4, 8>;  // of float64, for its registers and shared memory

// Rows of the depth, kExtent elements each: padded, and every four more so in a deep tile, so that the transposed stores of 32
// lanes fall into 32 banks.
template <int kExtent, int kDepth>
struct Rows {
    static constexpr int kStride = kExtent + 4, kFour = 4 * kStride + (kDepth > 8 ? 8 : 0), kSize = kDepth / 4 * kFour;
    static constexpr HOST_DEVICE int place(int depth, int at) { return depth / 4 * kFour + depth % 4 * kStride + at; }
};

template <class T, class Tile>
struct SimtStorage {
    using Left = Rows<Tile::kRows, Tile::kDepth>;
    using Right = Rows<Tile::kColumns, Tile::kDepth>;
    alignas(16) T left[2][Left::kSize];
    alignas(16) T right[2][Right::kSize];
};

// One operand's way from memory to shared memory, by fours where kWide, else one by one.
template <class T, class Tile, template <int, int> class Walk, int kExtent, bool kWide>
struct Staging {
    static constexpr bool kAlongDepth = Walk<1, 1>::kAlongDepth;
    static constexpr int kChunk = kWide ? 4 : 1;
    using Mine = Portion<T, Tile::kThreads, kExtent, Tile::kDepth, kChunk, kAlongDepth>;
    using Loader = Walk<Mine::kEach, Mine::kApart>;
    using Layout = Rows<kExtent, Tile::kDepth>;

    Loader loader;
    int place;
    T value[Mine::kPlaces][Mine::kEach][kChunk];

    DEVICE Staging(const typename Loader::View& view, int first, int thread, int begin, int end)
        : Staging(view, first, Mine(thread), begin, end) {}
    DEVICE Staging(const typename Loader::View& view, int first, const Mine& mine, int begin, int end)
        : loader(view, first + mine.at, begin + mine.depth, end), place(Layout::place(mine.depth, mine.at)) {}

    DEVICE void fetch() {
        UNROLL for (auto& place : value) {
            UNROLL for (int k = 0; k < Mine::kEach; ++k) {
                UNROLL for (int e = 0; e < kChunk; ++e) place[k][e] = T(0);
                if (!loader.valid(k)) continue;
                if constexpr (kWide) load4(loader.source(k), place[k]);
                else place[k][0] = ld(loader.source(k));
            }
            loader.advance(Mine::kStep);
        }
    }
    DEVICE void store(T* tile) const {
        UNROLL for (int i = 0; i < Mine::kPlaces; ++i)
            UNROLL for (int k = 0; k < Mine::kEach; ++k) {
                T* to = tile + place + Layout::place(i * Mine::kStep, k * Mine::kApart);
                if constexpr (kWide && !kAlongDepth) sts4(to, value[i][k]);
                else UNROLL for (int e = 0; e < kChunk; ++e) to[e * Layout::kStride] = value[i][k][e];
            }
    }
};

// The tile at (first_row, first_column) of left x right over begin ... end - 1 of the depth; then put(row, column, four sums).
template <class T, class Tile, bool kWide, class P, class Put>
DEVICE void simt_product(SimtStorage<T, Tile>& shared, const P& product, int first_row, int first_column, const Put& put) {
    using Storage = SimtStorage<T, Tile>;
    constexpr int kM = Tile::kRowsEach, kN = Tile::kColumnsEach;
    constexpr int kRowStep = Tile::kRows / (kM / 4), kColumnStep = Tile::kColumns / (kN / 4);
    const int thread = threadIdx.x, down = thread / Tile::kAcross * 4, across = thread % Tile::kAcross * 4;

    Staging<T, Tile, P::template Left, Tile::kRows, kWide> left(product.left, first_row, thread, product.begin, product.end);
    Staging<T, Tile, P::template Right, Tile::kColumns, kWide> right(product.right, first_column, thread, product.begin,
                                                                     product.end);
    T sum[kM][kN];
    UNROLL for (int i = 0; i < kM; ++i)
        UNROLL for (int j = 0; j < kN; ++j) sum[i][j] = T(0);

    const int steps = ceil_div(product.end - product.begin, Tile::kDepth);
    if (steps > 0) {
        left.fetch();
        right.fetch();
        left.store(shared.left[0]);
        right.store(shared.right[0]);
        if (!MUTANT(331, "simt: the first tile is complete before it is read")) BARRIER();
    }
    for (int step = 0; step < steps; ++step) {
        const int now = step & 1;
        const bool more = step + 1 < steps;
        if (more) {  // on its way while this tile is multiplied
            left.fetch();
            right.fetch();
        }
        UNROLL for (int k = 0; k < Tile::kDepth; ++k) {
            T a[kM], b[kN];
            const T* row = shared.left[now] + Storage::Left::place(k, down);
            const T* column = shared.right[now] + Storage::Right::place(k, across);
            UNROLL for (int i = 0; i < kM; i += 4) lds4(row + i / 4 * kRowStep, a + i);
            UNROLL for (int j = 0; j < kN; j += 4) lds4(column + j / 4 * kColumnStep, b + j);
            UNROLL for (int i = 0; i < kM; ++i)
                UNROLL for (int j = 0; j < kN; ++j) sum[i][j] += a[i] * b[j];
        }
        if (more) {
            left.store(shared.left[now ^ 1]);
            right.store(shared.right[now ^ 1]);
        }
        if (!MUTANT(332, "simt: a tile is complete, and the other free, before the next step")) BARRIER();
    }
    UNROLL for (int i = 0; i < kM; ++i) {
        const int row = first_row + down + i / 4 * kRowStep + i % 4;
        if (row >= product.out.rows && !MUTANT(333, "simt: rows past the last are not stored")) continue;
        UNROLL for (int j = 0; j < kN; j += 4) {
            T four[4] = {sum[i][j], sum[i][j + 1], sum[i][j + 2], sum[i][j + 3]};
            put(row, first_column + across + j / 4 * kColumnStep, four);
        }
    }
}

// Stores four neighbours of a row through the epilogue.
template <class T, bool kWide>
struct StoreFours {
    const OutputView<T>& out;
    const Epilogue<T>& epilogue;

    DEVICE void operator()(int row, int column, T (&sum)[4]) const {
        T* p = out.base + out.offset(row) + column;
        if (kWide) {
            if (column >= out.columns && !MUTANT(334, "simt: columns past the last are not stored")) return;
            epilogue(sum, row, column);
            store4(p, sum);
        } else {
            UNROLL for (int e = 0; e < 4; ++e)
                if (column + e < out.columns || MUTANT(335, "simt: single columns past the last are not stored"))
                    st(p + e, epilogue(sum[e], row, column + e));
        }
    }
};
