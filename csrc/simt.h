// The main loop on the ordinary multipliers (SIMT: each thread its own sums), double buffered. Used by igemm_simt and wino_f2.
#pragma once

#include "fours.h"
#include "igemm.h"

// A block computes kRows x kColumns of the product, a thread kRowsEach x kColumnsEach of it, kDepth deep a step.
template <int kRows_, int kColumns_, int kRowsEach_, int kColumnsEach_>
struct Tile {
    static constexpr int kRows = kRows_, kColumns = kColumns_, kRowsEach = kRowsEach_, kColumnsEach = kColumnsEach_, kDepth = 8;
    static constexpr int kAcross = kColumns / kColumnsEach, kThreads = kRows / kRowsEach * kAcross;
    static constexpr int kPad = 4;  // floats: so that the transposed stores of 32 lanes fall into 32 banks
};
using LargeTile = Tile<128, 128, 8, 8>;
using SmallTile = Tile<64, 64, 8, 4>;

template <class T, class Tile>
struct SimtStorage {
    alignas(16) T left[2][Tile::kDepth][Tile::kRows + Tile::kPad];
    alignas(16) T right[2][Tile::kDepth][Tile::kColumns + Tile::kPad];
};

// One operand's way from memory to shared memory. kExtent rows (or columns), fours of neighbours shared out among the threads.
template <class T, class Tile, template <int, int> class Walk, int kExtent, bool kWide>
struct Staging {
    static constexpr bool kAlongDepth = Walk<1, 1>::kAlongDepth;
    static constexpr int kFours = kAlongDepth ? Tile::kDepth / 4 : kExtent / 4;  // in a row of memory
    static constexpr int kApart = Tile::kThreads / kFours;
    static constexpr int kEach = (kAlongDepth ? kExtent : Tile::kDepth) / kApart;
    static_assert(kEach >= 1, "a thread has at least four elements to fetch");
    using Loader = Walk<kEach, kApart>;

    Loader loader;
    T value[kEach][4];
    int four, row;

    DEVICE Staging(const typename Loader::View& view, int first, int thread, int begin, int end)
        : loader(view, first + (kAlongDepth ? thread / kFours : thread % kFours * 4),
                 begin + (kAlongDepth ? thread % kFours * 4 : thread / kFours), end),
          four(thread % kFours * 4),
          row(thread / kFours) {}

    DEVICE void fetch() {
        UNROLL for (int k = 0; k < kEach; ++k) {
            if (!kWide) {
                loader.fetch(k, value[k]);
            } else if (loader.valid(k)) {
                load4(loader.source(k), value[k]);
            } else {
                UNROLL for (int e = 0; e < 4; ++e) value[k][e] = T(0);
            }
        }
        loader.advance(Tile::kDepth);
    }
    DEVICE void store(T (*tile)[kExtent + Tile::kPad]) const {
        UNROLL for (int k = 0; k < kEach; ++k) {
            if (kAlongDepth) {
                UNROLL for (int e = 0; e < 4; ++e) tile[four + e][row + k * kApart] = value[k][e];
            } else {
                sts4(&tile[row + k * kApart][four], value[k]);
            }
        }
    }
};

// The tile at (first_row, first_column) of left x right over begin ... end - 1 of the depth; then put(row, column, four sums).
template <class T, class Tile, bool kWide, class P, class Put>
DEVICE void simt_product(SimtStorage<T, Tile>& shared, const P& product, int first_row, int first_column, const Put& put) {
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
            UNROLL for (int i = 0; i < kM; i += 4) lds4(&shared.left[now][k][down + i / 4 * kRowStep], a + i);
            UNROLL for (int j = 0; j < kN; j += 4) lds4(&shared.right[now][k][across + j / 4 * kColumnStep], b + j);
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
            const T four[4] = {sum[i][j], sum[i][j + 1], sum[i][j + 2], sum[i][j + 3]};
            put(row, first_column + across + j / 4 * kColumnStep, four);
        }
    }
}

// Stores four neighbours of a row through the epilogue.
template <class T, bool kWide>
struct StoreFours {
    const OutputView<T>& out;
    const Epilogue<T>& epilogue;

    DEVICE void operator()(int row, int column, const T (&sum)[4]) const {
        T* p = out.base + out.offset(row) + column;
        T value[4];
        if (kWide) {
            if (column >= out.columns && !MUTANT(334, "simt: columns past the last are not stored")) return;
            UNROLL for (int e = 0; e < 4; ++e) value[e] = epilogue(sum[e], row, column + e);
            store4(p, value);
        } else {
            UNROLL for (int e = 0; e < 4; ++e)
                if (column + e < out.columns || MUTANT(335, "simt: single columns past the last are not stored"))
                    st(p + e, epilogue(sum[e], row, column + e));
        }
    }
};
