// adamw: one step of AdamW (Loshchilov & Hutter 2017) and of the moving average, for many parameters in one launch.
//
// Computes: m = beta1 m + (1 - beta1) g, v = beta2 v + (1 - beta2) g^2,
//   parameter = keep parameter - step m / (sqrt(v) root + eps), and average += take (parameter - average) where there is one;
//   keep = 1 - lr decay, step = lr / (1 - beta1^t), root = (1 - beta2^t)^-1/2.
// Tiling: a table of up to 32 parameters travels as the kernel's argument, so nothing is copied to the GPU beforehand; each
//   block finds its parameter in it and does 1024 elements.
// Bound by: memory: 5 values read and 4 written for each. As separate operations it would be some twenty passes and thousands
//   of launches.
#include "conv.h"

constexpr int kRows = 32, kThreads = 256, kEach = 4, kBlock = kThreads * kEach;

struct Row {
    float *parameter, *m, *v, *average;
    const float* gradient;
    int size, first_block;
};
struct Table {
    Row row[kRows];
    int count;
};
struct Rates {
    float keep, step, root, eps, keep_m, take_m, keep_v, take_v, take_average;
};

KERNEL_BOUNDS(kThreads, 4) adamw_step(Table table, Rates rate) {
    int k = 0;
    while (k + 1 < table.count && int(blockIdx.x) >= table.row[k + 1].first_block) ++k;
    const Row& row = table.row[k];
    const int first = (int(blockIdx.x) - row.first_block) * kBlock + threadIdx.x;
    UNROLL for (int e = 0; e < kEach; ++e) {
        const int i = first + e * kThreads;
        if (i >= row.size && !MUTANT(791, "adamw: threads past a parameter's end return")) return;
        const float g = ld(row.gradient + i);
        const float m = rate.keep_m * ld(row.m + i) + rate.take_m * g;
        const float v = rate.keep_v * ld(row.v + i) + rate.take_v * g * g;
        const float p = rate.keep * ld(row.parameter + i) - rate.step * m / (sqrtf(v) * rate.root + rate.eps);
        st(row.m + i, m);
        st(row.v + i, v);
        st(row.parameter + i, p);
        if (row.average) {
            const float a = ld(row.average + i);
            st(row.average + i, a + rate.take_average * (p - a));
        }
    }
}

int adamw(int count, const int64_t* changes, double lr, double beta1, double beta2, double eps, double weight_decay,
          double beta1_power, double beta2_power, double ema_decay, uintptr_t stream) {
    const Rates rate{float(1 - lr * weight_decay), float(lr / (1 - beta1_power)), float(1 / sqrt(1 - beta2_power)),
                     float(eps), float(beta1), float(1 - beta1), float(beta2), float(1 - beta2), float(1 - ema_decay)};
    for (int start = 0; start < count; start += kRows) {
        Table table{};
        int blocks = 0;
        for (int i = start; i < min(count, start + kRows); ++i) {
            const int64_t* change = changes + i * 6;  // addresses of parameter, gradient, m, v, average or 0; the size
            if (!change[5]) continue;
            const auto at = [&](int k) { return reinterpret_cast<float*>(change[k]); };
            table.row[table.count++] = {at(0), at(2), at(3), at(4), at(1), int(change[5]), blocks};
            blocks += ceil_div(int(change[5]), kBlock);
        }
        if (!blocks) continue;
        if (int error = LAUNCH(adamw_step, blocks, kThreads, 0, stream, table, rate)) return error;
    }
    return 0;
}
