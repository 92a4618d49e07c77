// Sums over a window, y[i] = x[i - radius] + ... + x[i + radius], with zeros outside: a block brings 64 elements and a border
// of 16 on either side to shared memory by asynchronous copies.
// It is here to prove the checks: each of its guards is a different kind of mistake.
#include "example.h"

#include "launch.h"

namespace {

constexpr int kBlock = 64, kBorder = 16, kTile = kBlock + 2 * kBorder;

struct Storage {
    float tile[kTile];
};

KERNEL_BOUNDS(kBlock, 1) window_sums_kernel(const float* x, float* y, int n, int radius) {
    SHARED(Storage, s);
    const int t = threadIdx.x, first = blockIdx.x * kBlock;
    for (int i = t; i < kTile; i += kBlock) {
        const int at = first - kBorder + i;
        const bool inside = (at >= 0 || MUTANT(1, "what lies in front of the array is read")) &&
                            (at < n || MUTANT(2, "what lies behind the array is read"));
        cp_async4(&s.tile[i], x + (inside ? at : 0), inside || MUTANT(3, "the border is not filled with zeros"));
        cp_async_commit();
    }
    if (!MUTANT(4, "copies are not waited for")) cp_async_wait<0>();
    if (!MUTANT(5, "other threads' copies are not waited for")) BARRIER();
    float sum = 0;
    for (int d = -radius; d <= radius; ++d) sum += s.tile[kBorder + t + d];
    if (first + t < n || MUTANT(6, "what lies behind the output is written")) y[first + t] = sum;
}

}  // namespace

int window_sums(const float* x, float* y, int n, int radius, std::uintptr_t stream) {
    if (radius > kBorder) return 1;
    return LAUNCH(window_sums_kernel, (n + kBlock - 1) / kBlock, kBlock, sizeof(Storage), stream, x, y, n, radius);
}
