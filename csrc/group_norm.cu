// group_norm: each sample's groups of channels to mean 0 and variance 1, scaled, shifted and activated; and its gradient.
//
// Computes: y = act((x - mean) rstd weight + bias) for x (n, pixels, channels), mean and rstd over a sample's pixels and a
//   group's channels (Wu & He 2018). With z the value before the activation, gz = gy act'(z), xh = (x - mean) rstd:
//     gweight = sum gz xh,  gbias = sum gz,  gx = rstd (gz weight - mean of gz weight - xh mean of gz weight xh)
//   where the means are over the group.
// Tiling: channels last, a group's values lie apart, so sums are taken a channel at a time: a block has 32 channels (a warp
//   reads 128 bytes side by side) x 8 lanes of a slice of the pixels. A second kernel, a warp for each group, adds up channels
//   and slices in a fixed order. The last one is elementwise, in the first's shape: what belongs to a channel is
//   computed once a thread and kept in registers.
// Bound by: memory; x is read twice and y written once (backward: x and gy twice, gx written), the least without holding a
//   group on the chip. Fusing the activation spares reading and writing y once more, forward and backward.
// The variance: a sum of squares would cancel where the mean is large, so each slice is summed about its own first value, and
//   slices are joined as (count, mean, squares about the mean) (Chan, Golub & LeVeque 1979).
#include "reduce.h"

constexpr int kChannels = 32, kLanes = 8, kThreads = kChannels * kLanes;

struct NormSize {
    int n, pixels, channels, groups, slices, pixels_per_slice, activation;
    DEVICE int group(int sample, int channel) const { return sample * groups + channel / (channels / groups); }
};

template <class T>
struct Pair {
    T first, second;
};

// The block's channel sums: lane 0 of each channel gets those of its 8 lanes, added in order.
template <class T>
struct Sums {
    Pair<T> lane[kLanes][kChannels];

    DEVICE Pair<T> total(Pair<T> mine) {
        const int c = threadIdx.x % kChannels, l = threadIdx.x / kChannels;
        lane[l][c] = mine;
        if (!MUTANT(701, "group_norm: all lanes' sums are there before they are added")) BARRIER();
        if (l == 0)
            for (int k = 1; k < kLanes; ++k) {
                mine.first += lane[k][c].first;
                mine.second += lane[k][c].second;
            }
        return mine;
    }
};

// What a block works on: pixels first ... last - 1 of a sample, this thread's channel.
struct Place {
    int channel, sample, first, last, lane;
    bool inside;
    DEVICE Place(const NormSize& a) {
        channel = blockIdx.y * kChannels + threadIdx.x % kChannels;
        sample = blockIdx.z;
        first = blockIdx.x * a.pixels_per_slice;
        last = MUTANT(702, "group_norm: the last slice ends with the sample") ? first + a.pixels_per_slice
                                                                              : min(first + a.pixels_per_slice, a.pixels);
        lane = threadIdx.x / kChannels;
        inside = channel < a.channels || MUTANT(703, "group_norm: channels past the last are left alone");
    }
    DEVICE size_t at(const NormSize& a, int pixel) const { return (size_t(sample) * a.pixels + pixel) * a.channels + channel; }
    DEVICE size_t part(const NormSize& a) const { return (size_t(sample) * a.slices + blockIdx.x) * a.channels + channel; }
};

// parts (n, slices, channels): mean, and squares about it.
template <class T>
KERNEL_BOUNDS(kThreads, 4)
group_norm_moments(NormSize a, const T* x, Pair<T>* parts) {
    SHARED(Sums<T>, shared);
    const Place place(a);
    Pair<T> sum{};
    T shift = 0;
    if (place.inside) {
        shift = ld(x + place.at(a, place.first));
        for (int pixel = place.first + place.lane; pixel < place.last; pixel += kLanes) {
            const T d = ld(x + place.at(a, pixel)) - shift;
            sum.first += d;
            sum.second += d * d;
        }
    }
    sum = shared.total(sum);
    if (place.lane || !place.inside) return;
    const T mean = sum.first / T(place.last - place.first);
    st(&parts[place.part(a)].first, shift + mean);
    st(&parts[place.part(a)].second, sum.second - sum.first * mean);
}

// mean and rstd (n, groups), a warp each.
template <class T>
KERNEL_BOUNDS(32, 16)
group_norm_statistics(NormSize a, const Pair<T>* parts, T eps, T* mean, T* rstd) {
    const int lane = threadIdx.x, each = a.channels / a.groups, sample = blockIdx.x / a.groups;
    const int first_channel = blockIdx.x % a.groups * each;
    T count = 0, middle = 0, squares = 0;
    const auto join = [&](T n, T m, T s) {
        const T all = count + n, d = m - middle;
        if (!(all > T(0))) return;
        middle += d * (n / all);
        squares += s + d * d * (count * n / all);
        count = all;
    };
    for (int i = lane; i < each * a.slices; i += 32) {
        const int slice = i / each, channel = first_channel + i % each;
        const Pair<T>* part = parts + (size_t(sample) * a.slices + slice) * a.channels + channel;
        join(T(min(a.pixels_per_slice, a.pixels - slice * a.pixels_per_slice)), ld(&part->first), ld(&part->second));
    }
    for (int step = 16; step; step /= 2) {
        const T n = SHFL_DOWN(kWholeWarp, count, step), m = SHFL_DOWN(kWholeWarp, middle, step);
        join(n, m, SHFL_DOWN(kWholeWarp, squares, step));
    }
    if (lane && !MUTANT(711, "group_norm: only the lane with the sum stores it")) return;
    st(mean + blockIdx.x, middle);
    st(rstd + blockIdx.x, inverse_root(squares / count + eps));
}

template <class T>
struct Affine {
    const T *weight, *bias;
    DEVICE T w(int c) const { return weight ? ld(weight + c) : T(1); }
    DEVICE T b(int c) const { return bias ? ld(bias + c) : T(0); }
};

template <class T>
KERNEL_BOUNDS(kThreads, 4)
group_norm_apply(NormSize a, const T* x, Affine<T> affine, const T* mean, const T* rstd, T* y) {
    const Place place(a);
    if (!place.inside) return;
    const int group = a.group(place.sample, place.channel);
    const T scale = ld(rstd + group) * affine.w(place.channel), centre = ld(mean + group), shift = affine.b(place.channel);
    for (int pixel = place.first + place.lane; pixel < place.last; pixel += kLanes) {
        const size_t i = place.at(a, pixel);
        st(y + i, activated((ld(x + i) - centre) * scale + shift, a.activation));
    }
}

// gz and xh of one value.
template <class T>
struct Slope {
    T centre, rstd, w, b;
    int activation;
    DEVICE Slope(const NormSize& a, const Place& place, const Affine<T>& affine, const T* mean, const T* inverse)
        : centre(ld(mean + a.group(place.sample, place.channel))),
          rstd(ld(inverse + a.group(place.sample, place.channel))),
          w(affine.w(place.channel)),
          b(affine.b(place.channel)),
          activation(a.activation) {}
    DEVICE Pair<T> operator()(T g, T x) const {
        const T xh = (x - centre) * rstd;
        return {activation == kNone ? g : g * activation_slope(xh * w + b, activation), xh};
    }
};

// parts (n, slices, channels): sum of gz, sum of gz xh.
template <class T>
KERNEL_BOUNDS(kThreads, 4)
group_norm_sums(NormSize a, const T* g, const T* x, Affine<T> affine, const T* mean, const T* rstd, Pair<T>* parts) {
    SHARED(Sums<T>, shared);
    const Place place(a);
    Pair<T> sum{};
    if (place.inside) {
        const Slope<T> slope(a, place, affine, mean, rstd);
        for (int pixel = place.first + place.lane; pixel < place.last; pixel += kLanes) {
            const size_t i = place.at(a, pixel);
            const Pair<T> v = slope(ld(g + i), ld(x + i));
            sum.first += v.first;
            sum.second += v.first * v.second;
        }
    }
    sum = shared.total(sum);
    if (place.lane || !place.inside) return;
    st(&parts[place.part(a)].first, sum.first);
    st(&parts[place.part(a)].second, sum.second);
}

// means (n, groups): of gz weight, and of gz weight xh; a warp each.
template <class T>
KERNEL_BOUNDS(32, 16)
group_norm_means(NormSize a, const Pair<T>* parts, Affine<T> affine, Pair<T>* means) {
    const int lane = threadIdx.x, each = a.channels / a.groups, sample = blockIdx.x / a.groups;
    const int first_channel = blockIdx.x % a.groups * each;
    Pair<T> sum{};
    for (int i = lane; i < each * a.slices; i += 32) {
        const int slice = i / each, channel = first_channel + i % each;
        const Pair<T>* part = parts + (size_t(sample) * a.slices + slice) * a.channels + channel;
        sum.first += ld(&part->first) * affine.w(channel);
        sum.second += ld(&part->second) * affine.w(channel);
    }
    sum = {warp_sum(sum.first), warp_sum(sum.second)};
    if (lane && !MUTANT(721, "group_norm: only one lane stores the means")) return;
    const T count = T(each) * T(a.pixels);
    st(&means[blockIdx.x].first, sum.first / count);
    st(&means[blockIdx.x].second, sum.second / count);
}

// gweight and gbias: a channel a thread, samples and slices in order.
template <class T>
KERNEL_BOUNDS(128, 8)
group_norm_parameters(NormSize a, const Pair<T>* parts, T* gweight, T* gbias) {
    const int channel = blockIdx.x * blockDim.x + threadIdx.x;
    if (channel >= a.channels && !MUTANT(731, "group_norm: threads past the last channel return")) return;
    Pair<T> sum{};
    for (int i = 0; i < a.n * a.slices; ++i) {
        sum.first += ld(&parts[size_t(i) * a.channels + channel].first);
        sum.second += ld(&parts[size_t(i) * a.channels + channel].second);
    }
    if (gbias) st(gbias + channel, sum.first);
    if (gweight) st(gweight + channel, sum.second);
}

template <class T>
KERNEL_BOUNDS(kThreads, 4)
group_norm_gradient(NormSize a, const T* g, const T* x, Affine<T> affine, const T* mean, const T* rstd, const Pair<T>* means,
                    T* gx) {
    const Place place(a);
    if (!place.inside) return;
    const Slope<T> slope(a, place, affine, mean, rstd);
    const Pair<T>* of_group = means + a.group(place.sample, place.channel);
    const T first = ld(&of_group->first), second = ld(&of_group->second);
    for (int pixel = place.first + place.lane; pixel < place.last; pixel += kLanes) {
        const size_t i = place.at(a, pixel);
        const Pair<T> v = slope(ld(g + i), ld(x + i));
        st(gx + i, slope.rstd * (v.first * slope.w - first - v.second * second));
    }
}

static NormSize size_of(int n, int pixels, int channels, int groups, int activation) {
    const int slices = min(64, ceil_div(pixels, 64)), each = ceil_div(pixels, max(slices, 1));
    return {n, pixels, channels, groups, ceil_div(pixels, max(each, 1)), each, activation};
}

static dim3 grid_of(const NormSize& a) { return dim3(a.slices, ceil_div(a.channels, kChannels), a.n); }

template <class T>
static int forward(const NormSize& a, double eps, const void* x, const void* weight, const void* bias, void* y, void* mean,
                   void* rstd, void* workspace, uintptr_t stream) {
    const T* image = static_cast<const T*>(x);
    T *m = static_cast<T*>(mean), *r = static_cast<T*>(rstd);
    Pair<T>* parts = static_cast<Pair<T>*>(workspace);
    const Affine<T> affine{static_cast<const T*>(weight), static_cast<const T*>(bias)};
    if (int error = LAUNCH(group_norm_moments<T>, grid_of(a), kThreads, sizeof(Sums<T>), stream, a, image, parts)) return error;
    if (int error = LAUNCH(group_norm_statistics<T>, a.n * a.groups, 32, 0, stream, a, parts, T(eps), m, r)) return error;
    return LAUNCH(group_norm_apply<T>, grid_of(a), kThreads, 0, stream, a, image, affine, m, r, static_cast<T*>(y));
}

template <class T>
static int backward(const NormSize& a, const void* gy, const void* x, const void* weight, const void* bias, const void* mean,
                    const void* rstd, void* gx, void* gweight, void* gbias, void* workspace, uintptr_t stream) {
    const T *g = static_cast<const T*>(gy), *image = static_cast<const T*>(x);
    const T *m = static_cast<const T*>(mean), *r = static_cast<const T*>(rstd);
    Pair<T>* parts = static_cast<Pair<T>*>(workspace);
    Pair<T>* means = parts + size_t(a.n) * a.slices * a.channels;
    const Affine<T> affine{static_cast<const T*>(weight), static_cast<const T*>(bias)};
    if (int error = LAUNCH(group_norm_sums<T>, grid_of(a), kThreads, sizeof(Sums<T>), stream, a, g, image, affine, m, r, parts))
        return error;
    if (int error = LAUNCH(group_norm_means<T>, a.n * a.groups, 32, 0, stream, a, parts, affine, means)) return error;
    if (gweight || gbias)
        if (int error = LAUNCH(group_norm_parameters<T>, ceil_div(a.channels, 128), 128, 0, stream, a, parts,
                               static_cast<T*>(gweight), static_cast<T*>(gbias)))
            return error;
    return LAUNCH(group_norm_gradient<T>, grid_of(a), kThreads, 0, stream, a, g, image, affine, m, r, means,
                  static_cast<T*>(gx));
}

static bool takes(const NormSize& a, int precision) {
    return precision <= kFloat64 && a.n > 0 && a.n <= 65535 && a.pixels > 0 && a.groups > 0 && a.channels >= a.groups &&
           a.channels % a.groups == 0;
}

int group_norm(int precision, int n, int pixels, int channels, int groups, double eps, int activation, const void* x,
               const void* weight, const void* bias, void* y, void* mean, void* rstd, void* workspace, uintptr_t stream) {
    const NormSize a = size_of(n, pixels, channels, groups, activation);
    if (!takes(a, precision)) return kUnsupported;
    const auto run = precision == kFloat64 ? forward<double> : forward<float>;
    return run(a, eps, x, weight, bias, y, mean, rstd, workspace, stream);
}

int group_norm_backward(int precision, int n, int pixels, int channels, int groups, int activation, const void* gy,
                        const void* x, const void* weight, const void* bias, const void* mean, const void* rstd, void* gx,
                        void* gweight, void* gbias, void* workspace, uintptr_t stream) {
    const NormSize a = size_of(n, pixels, channels, groups, activation);
    if (!takes(a, precision)) return kUnsupported;
    const auto run = precision == kFloat64 ? backward<double> : backward<float>;
    return run(a, gy, x, weight, bias, mean, rstd, gx, gweight, gbias, workspace, stream);
}

int64_t group_norm_workspace(int precision, int n, int pixels, int channels, int groups) {
    const NormSize a = size_of(n, pixels, channels, groups, kNone);
    return (int64_t(n) * a.slices * channels + int64_t(n) * groups) * 2 * (precision == kFloat64 ? 8 : 4);
}
