// Staging with asynchronous copies: from memory into shared memory without passing through registers.
//
// A thread asks for its 16-byte chunks of a tile and goes on; the copies of a tile make a group, and a thread can wait until at
// most so many of its groups are on their way. What a copy is told is not valid arrives as zeros: padding costs nothing.
#pragma once

#include "igemm.h"

// Rows of a tile (kExtent x kDepth or kDepth x kExtent), each kPad elements longer than its contents.
template <int kLength, int kPad>
struct Padded {
    static constexpr int kStride = kLength + kPad;
    static constexpr HOST_DEVICE int size(int rows) { return rows * kStride; }
    static DEVICE int place(int row, int inner) { return row * kStride + inner; }
};

// Layout::place(row, inner) says where in the tile a chunk lies; rows a multiple of 16 further it lies as many strides further.
template <class In, int kThreads, int kDepth, int kExtent, template <int, int> class Walk, class Layout>
struct AsyncStaging {
    static constexpr bool kAlongDepth = Walk<1, 1>::kAlongDepth;
    using Mine = Portion<In, kThreads, kExtent, kDepth, 16 / sizeof(In), kAlongDepth>;
    using Loader = Walk<Mine::kEach, Mine::kApart>;
    static_assert(Mine::kEach == 1 || !kAlongDepth || Mine::kApart % 16 == 0, "Layout::place is asked for the first row only");

    Loader loader;
    int place;

    DEVICE AsyncStaging(const typename Loader::View& view, int first, int thread, int begin, int end)
        : AsyncStaging(view, first, Mine(thread), begin, end) {}
    DEVICE AsyncStaging(const typename Loader::View& view, int first, const Mine& mine, int begin, int end)
        : loader(view, first + mine.at, begin + mine.depth, end),
          place(kAlongDepth ? Layout::place(mine.at, mine.depth) : Layout::place(mine.depth, mine.at)) {}

    DEVICE void issue(In* tile) {
        constexpr int kNext = Mine::kApart * (kAlongDepth ? Layout::kStride : 1), kDeeper = Mine::kStep * Layout::kStride;
        UNROLL for (int i = 0; i < Mine::kPlaces; ++i) {
            UNROLL for (int k = 0; k < Mine::kEach; ++k)
                cp_async16(tile + (place + i * kDeeper + k * kNext), loader.source(k), loader.valid(k));
            loader.advance(Mine::kStep);
        }
    }
};

// The loop around kStages tiles: issue(stage) starts the copies of the next tile, multiply(stage) uses one that is complete.
// Before a step, all but kStages - 2 groups have arrived (so this step's has), and all threads are past the last step, whose
// tile the new copies overwrite: one barrier does for both.
template <int kStages, class Issue, class Multiply>
DEVICE void async_pipeline(int steps, const Issue& issue, const Multiply& multiply) {
    for (int step = 0; step < kStages - 1; ++step) {
        if (step < steps) issue(step);
        cp_async_commit();
    }
    int now = 0, free = kStages - 1;
    for (int step = 0; step < steps; ++step) {
        if (!MUTANT(401, "async: a tile has arrived before it is read")) cp_async_wait<kStages - 2>();
        if (!MUTANT(402, "async: all threads' copies have arrived, and the oldest tile is free")) BARRIER();
        const bool more = step + kStages - 1 < steps;
        if (more) issue(free);
        // Empty groups at the end keep the count: without them the last tiles would not be waited for.
        if (more || !MUTANT(403, "async: empty groups are committed at the end")) cp_async_commit();
        multiply(now);
        free = now;
        now = now + 1 < kStages ? now + 1 : 0;
    }
}
