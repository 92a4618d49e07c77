// layer_norm: each row to mean 0 and variance 1, scaled and shifted (Ba et al. 2016); and its gradient.
//
// Computes: y = (x - mean) rstd weight + bias for x (rows, size), and the gradients as in group_norm.cu, with a row for a group.
// Tiling: a warp a row, for the row and its gradient; the gradients of weight and bias are sums over rows: 32 columns x 8 lanes
//   of a slice of the rows a block, then a column a thread over the slices, in order.
// Bound by: memory. A row of some thousand floats stays in the cache between the three times its warp reads it.
#include "reduce.h"

constexpr int kWarps = 8, kThreads = 32 * kWarps;

template <class T>
KERNEL_BOUNDS(kThreads, 4)
layer_norm_rows(int rows, int size, T eps, const T* x, const T* weight, const T* bias, T* y, T* mean, T* rstd) {
    const int row = blockIdx.x * kWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows && !MUTANT(741, "layer_norm: warps past the last row return")) return;
    const T* from = x + size_t(row) * size;
    T sum = 0, squares = 0;
    for (int i = lane; i < size; i += 32) sum += ld(from + i);
    const T centre = warp_sum(sum) / T(size);
    for (int i = lane; i < size; i += 32) squares += (ld(from + i) - centre) * (ld(from + i) - centre);
    const T scale = inverse_root(warp_sum(squares) / T(size) + eps);
    for (int i = lane; i < size; i += 32)
        st(y + size_t(row) * size + i,
           (ld(from + i) - centre) * scale * (weight ? ld(weight + i) : T(1)) + (bias ? ld(bias + i) : T(0)));
    if (lane && !MUTANT(742, "layer_norm: one lane stores a row's statistics")) return;
    st(mean + row, centre);
    st(rstd + row, scale);
}

template <class T>
KERNEL_BOUNDS(kThreads, 4)
layer_norm_gradient(int rows, int size, const T* gy, const T* x, const T* weight, const T* mean, const T* rstd, T* gx) {
    const int row = blockIdx.x * kWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows && !MUTANT(751, "layer_norm gradient: warps past the last row return")) return;
    const size_t first = size_t(row) * size;
    const T centre = ld(mean + row), scale = ld(rstd + row);
    T sum = 0, along = 0;
    for (int i = lane; i < size; i += 32) {
        const T g = ld(gy + first + i) * (weight ? ld(weight + i) : T(1));
        sum += g;
        along += g * (ld(x + first + i) - centre) * scale;
    }
    sum = warp_sum(sum) / T(size);
    along = warp_sum(along) / T(size);
    for (int i = lane; i < size; i += 32) {
        const T g = ld(gy + first + i) * (weight ? ld(weight + i) : T(1));
        st(gx + first + i, scale * (g - sum - (ld(x + first + i) - centre) * scale * along));
    }
}

template <class T>
struct ColumnSums {
    T weight[kWarps][32], bias[kWarps][32];
};

// parts (slices, 2, size): sums of gy xh and of gy over a slice's rows.
template <class T>
KERNEL_BOUNDS(kThreads, 4)
layer_norm_columns(int rows, int size, int rows_per_slice, const T* gy, const T* x, const T* mean, const T* rstd, T* parts) {
    SHARED(ColumnSums<T>, shared);
    const int column = blockIdx.x * 32 + threadIdx.x % 32, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int first = blockIdx.y * rows_per_slice;
    const int last =
        MUTANT(761, "layer_norm columns: the last slice ends with the rows") ? first + rows_per_slice : min(first + rows_per_slice, rows);
    const bool inside = column < size || MUTANT(762, "layer_norm columns: columns past the last are left alone");
    T weight = 0, bias = 0;
    for (int row = first + warp; inside && row < last; row += kWarps) {
        const T g = ld(gy + size_t(row) * size + column);
        weight += g * (ld(x + size_t(row) * size + column) - ld(mean + row)) * ld(rstd + row);
        bias += g;
    }
    shared.weight[warp][lane] = weight;
    shared.bias[warp][lane] = bias;
    if (!MUTANT(763, "layer_norm columns: all warps' sums are there before they are added")) BARRIER();
    if (warp || !inside) return;
    for (int k = 1; k < kWarps; ++k) {
        weight += shared.weight[k][lane];
        bias += shared.bias[k][lane];
    }
    st(parts + size_t(blockIdx.y) * 2 * size + column, weight);
    st(parts + size_t(blockIdx.y) * 2 * size + size + column, bias);
}

// i < size: gweight, else gbias.
template <class T>
KERNEL_BOUNDS(128, 8)
layer_norm_parameters(int size, int slices, const T* parts, T* gweight, T* gbias) {
    const int i = blockIdx.x * 128 + threadIdx.x;
    if (i >= 2 * size && !MUTANT(771, "layer_norm parameters: threads past the end return")) return;
    T* result = i < size ? gweight : gbias;
    if (!result) return;
    T sum = 0;
    for (int slice = 0; slice < slices; ++slice) sum += ld(parts + size_t(slice) * 2 * size + i);
    st(result + (i < size ? i : i - size), sum);
}

static int slices_of(int rows) { return min(64, ceil_div(rows, 64)); }

template <class T>
static int forward(int rows, int size, double eps, const void* x, const void* weight, const void* bias, void* y, void* mean,
                   void* rstd, uintptr_t stream) {
    return LAUNCH(layer_norm_rows<T>, ceil_div(rows, kWarps), kThreads, 0, stream, rows, size, T(eps), static_cast<const T*>(x),
                  static_cast<const T*>(weight), static_cast<const T*>(bias), static_cast<T*>(y), static_cast<T*>(mean),
                  static_cast<T*>(rstd));
}

template <class T>
static int backward(int rows, int size, const void* gy, const void* x, const void* weight, const void* mean, const void* rstd,
                    void* gx, void* gweight, void* gbias, void* workspace, uintptr_t stream) {
    const T *g = static_cast<const T*>(gy), *from = static_cast<const T*>(x);
    const T *m = static_cast<const T*>(mean), *r = static_cast<const T*>(rstd);
    if (int error = LAUNCH(layer_norm_gradient<T>, ceil_div(rows, kWarps), kThreads, 0, stream, rows, size, g, from,
                           static_cast<const T*>(weight), m, r, static_cast<T*>(gx)))
        return error;
    if (!gweight && !gbias) return 0;
    T* parts = static_cast<T*>(workspace);
    const int each = ceil_div(rows, slices_of(rows)), slices = ceil_div(rows, each);
    if (int error = LAUNCH(layer_norm_columns<T>, dim3(ceil_div(size, 32), slices), kThreads, sizeof(ColumnSums<T>), stream, rows,
                           size, each, g, from, m, r, parts))
        return error;
    return LAUNCH(layer_norm_parameters<T>, ceil_div(2 * size, 128), 128, 0, stream, size, slices, parts,
                  static_cast<T*>(gweight), static_cast<T*>(gbias));
}

int layer_norm(int precision, int rows, int size, double eps, const void* x, const void* weight, const void* bias, void* y,
               void* mean, void* rstd, uintptr_t stream) {
    if (precision > kFloat64 || rows <= 0 || size <= 0) return kUnsupported;
    const auto run = precision == kFloat64 ? forward<double> : forward<float>;
    return run(rows, size, eps, x, weight, bias, y, mean, rstd, stream);
}

int layer_norm_backward(int precision, int rows, int size, const void* gy, const void* x, const void* weight, const void* mean,
                        const void* rstd, void* gx, void* gweight, void* gbias, void* workspace, uintptr_t stream) {
    if (precision > kFloat64 || rows <= 0 || size <= 0) return kUnsupported;
    const auto run = precision == kFloat64 ? backward<double> : backward<float>;
    return run(rows, size, gy, x, weight, mean, rstd, gx, gweight, gbias, workspace, stream);
}

int64_t layer_norm_workspace(int precision, int rows, int size) {
    return int64_t(slices_of(rows)) * 2 * size * (precision == kFloat64 ? 8 : 4);
}
