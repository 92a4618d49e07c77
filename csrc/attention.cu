// attention: softmax(q kᵀ scale) v for each head, without ever storing the softmax; and its gradient (Dao et al. 2022).
//
// Computes: with s = scale q·k where a query sees a key and -inf elsewhere, l = log sum exp s and p = exp(s - l):
//   out = p v; backward, with d = g·out for each query and t = p (g·v - d): gv = pᵀ g, gq = scale t k, gk = scale tᵀ q.
//   Arrays are (n, length, heads, size), as linear layers write them. A query that sees no key gets zeros.
// Tiling, forward: a block has 64 queries of a head and goes through the keys 64 at a time (32 for heads above 64). A team of
//   16 lanes has 8 of the queries: each lane the scores of 4 keys and, of the result, a sixteenth of the columns. The largest
//   score and the sum of exponentials so far are kept for each query, and what is summed already is rescaled when the largest
//   grows ("online" softmax, Milakov & Gimelshein 2018). Keys and values take turns in one tile, which leaves room for three
//   blocks where 164 KB are shared. Scores become the left factor of the second product by way of shared memory.
// Backward: p is computed again from l, twice: one kernel has 64 queries a block and sums gq over keys, one has 64 keys and sums
//   gk and gv over queries. That is seven products instead of five, and no atomics: the same bits every time.
// Bound by: arithmetic, from some hundred keys on: a key's row is read once for 64 queries. Both factors of a product come
//   from shared memory, 12 reads of 16 bytes for 128 fused multiplications; heads are filled up with zeros to 32, 64 or 128.
//   A head with few queries is one block, however many keys it has: a small batch of short sequences leaves a GPU idle.
#include "fours.h"
#include "reduce.h"

constexpr int kThreads = 128, kTeam = 16, kPad = 4;  // the pad spreads 8 lanes' rows over all banks

struct Mask {
    const uint8_t* base;  // or null: every query sees every key
    int sample, head, query, key;  // strides, 0 along an axis that is repeated
};

struct Sizes {
    int n, heads, queries, keys, size, value_size;
    bool causal, wide;  // wide: rows of all arrays may be read four at a time
    Mask mask;
};

// The rows of one head.
template <class T>
struct Head {
    T* base;
    int length, size, pitch;
    bool wide;
    DEVICE Head(const Sizes& a, T* array, int index, int length, int size)
        : base(array + (size_t(index / a.heads) * length * a.heads + index % a.heads) * size),
          length(length),
          size(size),
          pitch(a.heads * size),
          wide(a.wide) {}
    DEVICE T* row(int i) const { return base + size_t(i) * pitch; }
};

// How a block's rows and columns are shared out among its threads: kRowsEach rows a team, every 16th column a lane.
template <class T, int kSize_, int kRowsEach_, int kColumnsEach_>
struct Tile {
    static constexpr int kSize = kSize_, kRowsEach = kRowsEach_, kColumnsEach = kColumnsEach_, kSizeEach = kSize / kTeam;
    static constexpr int kRows = kThreads / kTeam * kRowsEach, kColumns = kTeam * kColumnsEach;
    using Row = T[kSize + kPad];
    using Weights = T[kColumns + kPad];

    static DEVICE int lane() { return threadIdx.x % kTeam; }
    // Two teams of a warp have rows that lie 4 apart, half the banks: they store to different ones.
    static DEVICE int row(int i) {
        const int team = threadIdx.x / kTeam;
        return team / 2 * 2 * kRowsEach + team % 2 * 4 + i % 4 + i / 4 * 8;
    }
    static DEVICE int column(int j) { return lane() + kTeam * j; }
    // Along a head's size a lane has neighbours.
    static DEVICE int place(int c) { return kSizeEach < 4 ? lane() * kSizeEach + c : lane() * 4 + c % 4 + c / 4 * 64; }

    // kCount rows of a head, from `first` on; zeros where it has no more, and past its size.
    template <int kCount>
    static DEVICE void fetch(Row* tile, const Head<const T>& from, int first) {
        for (int i = threadIdx.x; i < kCount * kSize / 4; i += kThreads) {
            const int row = i / (kSize / 4), column = i % (kSize / 4) * 4;
            T v[4] = {T(0), T(0), T(0), T(0)};
            if (first + row < from.length || MUTANT(801, "attention: rows past a head's last are zeros")) {
                const T* p = from.row(first + row) + column;
                if (from.wide) {
                    if (column < from.size || MUTANT(802, "attention: fours past a head's size are zeros")) load4(p, v);
                } else {
                    UNROLL for (int e = 0; e < 4; ++e)
                        if (column + e < from.size || MUTANT(803, "attention: columns past a head's size are zeros"))
                            v[e] = ld(p + e);
                }
            }
            sts4(&tile[row][column], v);
        }
    }
    // sum[i][j] = the thread's i-th row of left times its j-th column, a row of right.
    static DEVICE void multiply(const Row* left, const Row* right, T (&sum)[kRowsEach][kColumnsEach]) {
        UNROLL for (int i = 0; i < kRowsEach; ++i)
            UNROLL for (int j = 0; j < kColumnsEach; ++j) sum[i][j] = T(0);
        for (int d = 0; d < kSize; d += 4) {
            T a[kRowsEach][4];
            UNROLL for (int i = 0; i < kRowsEach; ++i) lds4(&left[row(i)][d], a[i]);
            UNROLL for (int j = 0; j < kColumnsEach; ++j) {
                T b[4];
                lds4(&right[column(j)][d], b);
                UNROLL for (int i = 0; i < kRowsEach; ++i)
                    UNROLL for (int e = 0; e < 4; ++e) sum[i][j] += a[i][e] * b[e];
            }
        }
    }
    // sum[i][c] += the thread's i-th row of weights times its c-th place of right's rows.
    static DEVICE void accumulate(const Weights* weights, const Row* right, T (&sum)[kRowsEach][kSizeEach]) {
        for (int k = 0; k < kColumns; k += 4) {
            T a[kRowsEach][4];
            UNROLL for (int i = 0; i < kRowsEach; ++i) lds4(&weights[row(i)][k], a[i]);
            UNROLL for (int e = 0; e < 4; ++e) {
                T b[kSizeEach];
                if constexpr (kSizeEach < 4) {
                    UNROLL for (int c = 0; c < kSizeEach; ++c) b[c] = right[k + e][place(c)];
                } else {
                    UNROLL for (int c = 0; c < kSizeEach; c += 4) lds4(&right[k + e][place(c)], b + c);
                }
                UNROLL for (int i = 0; i < kRowsEach; ++i)
                    UNROLL for (int c = 0; c < kSizeEach; ++c) sum[i][c] += a[i][e] * b[c];
            }
        }
    }
    static DEVICE void put(Weights* weights, const T (&value)[kRowsEach][kColumnsEach]) {
        UNROLL for (int i = 0; i < kRowsEach; ++i)
            UNROLL for (int j = 0; j < kColumnsEach; ++j) weights[row(i)][column(j)] = value[i][j];
    }
    // The block's rows of a result, from `first` on.
    static DEVICE void store(const Head<T>& to, int first, const T (&sum)[kRowsEach][kSizeEach]) {
        UNROLL for (int i = 0; i < kRowsEach; ++i) {
            if (first + row(i) >= to.length && !MUTANT(804, "attention: rows past a head's last are not stored")) continue;
            T* p = to.row(first + row(i));
            UNROLL for (int c = 0; c < kSizeEach; ++c)
                if (place(c) < to.size || MUTANT(805, "attention: columns past a head's size are not stored"))
                    st(p + place(c), sum[i][c]);
        }
    }
};

// Whether a query of a head sees a key.
DEVICE bool visible(const Sizes& a, int head, int query, int key) {
    if (key >= a.keys && !MUTANT(811, "attention: no query sees a key past the last")) return false;
    if (query >= a.queries && !MUTANT(812, "attention: queries past the last see nothing")) return false;
    if (a.causal && key > query && !MUTANT(813, "attention: causal: no query sees a later key")) return false;
    const Mask& m = a.mask;
    if (!m.base || MUTANT(814, "attention: the mask holds")) return true;
    return ld(m.base + size_t(head / a.heads) * m.sample + size_t(head % a.heads) * m.head + size_t(query) * m.query +
              size_t(key) * m.key);
}

template <class T>
DEVICE T team_sum(T v) {
    UNROLL for (int step = kTeam / 2; step; step /= 2) v += SHFL_XOR(kWholeWarp, v, step);
    return v;
}
template <class T>
DEVICE T team_max(T v) {
    UNROLL for (int step = kTeam / 2; step; step /= 2) v = max(v, SHFL_XOR(kWholeWarp, v, step));
    return v;
}

template <class T, class Tile>
struct ForwardStorage {
    alignas(16) typename Tile::Row query[Tile::kRows];
    alignas(16) typename Tile::Row key_or_value[Tile::kColumns];
    alignas(16) typename Tile::Weights weights[Tile::kRows];
};

// Three blocks on a multiprocessor, or as many as its shared memory (in KB) holds: to save registers for more would be in vain.
#if __CUDA_ARCH__ == 750
constexpr int kShared = 64;
#elif __CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ == 1200
constexpr int kShared = 100;
#elif __CUDA_ARCH__ == 900 || __CUDA_ARCH__ == 1000
constexpr int kShared = 228;
#else
constexpr int kShared = 164;
#endif
template <class Storage>
constexpr int kFitting = kShared * 1024 / int(sizeof(Storage) + 1024);
template <class Storage>
constexpr int kBlocks = kFitting<Storage> < 1 ? 1 : kFitting<Storage> > 3 ? 3 : kFitting<Storage>;

// logsumexp (n, heads, queries).
template <class T, class Tile>
KERNEL_BOUNDS(kThreads, (kBlocks<ForwardStorage<T, Tile>>))
attention_rows(Sizes a, T scale, const T* q, const T* k, const T* v, T* out, T* logsumexp) {
    using Storage = ForwardStorage<T, Tile>;
    SHARED(Storage, shared);
    const int blocks = ceil_div(a.queries, Tile::kRows), head = blockIdx.x / blocks, first = blockIdx.x % blocks * Tile::kRows;
    const Head<const T> keys(a, k, head, a.keys, a.size), values(a, v, head, a.keys, a.value_size);
    Tile::template fetch<Tile::kRows>(shared.query, Head<const T>(a, q, head, a.queries, a.size), first);

    T largest[Tile::kRowsEach], total[Tile::kRowsEach], sum[Tile::kRowsEach][Tile::kSizeEach];
    UNROLL for (int i = 0; i < Tile::kRowsEach; ++i) {
        largest[i] = T(-INFINITY);
        total[i] = T(0);  // of this lane's keys; lanes are joined at the end
        UNROLL for (int c = 0; c < Tile::kSizeEach; ++c) sum[i][c] = T(0);
    }
    const int end = a.causal ? min(a.keys, first + Tile::kRows) : a.keys;
    for (int begin = 0; begin < end; begin += Tile::kColumns) {
        if (begin && !MUTANT(821, "attention: values are multiplied before keys overwrite them")) BARRIER();
        Tile::template fetch<Tile::kColumns>(shared.key_or_value, keys, begin);
        if (!MUTANT(822, "attention: queries and keys are there before they are multiplied")) BARRIER();
        T s[Tile::kRowsEach][Tile::kColumnsEach];
        Tile::multiply(shared.query, shared.key_or_value, s);
        if (!MUTANT(823, "attention: keys are multiplied before values overwrite them")) BARRIER();
        Tile::template fetch<Tile::kColumns>(shared.key_or_value, values, begin);
        UNROLL for (int i = 0; i < Tile::kRowsEach; ++i) {
            T top = largest[i];
            UNROLL for (int j = 0; j < Tile::kColumnsEach; ++j) {
                const bool seen = visible(a, head, first + Tile::row(i), begin + Tile::column(j));
                s[i][j] = seen ? s[i][j] * scale : T(-INFINITY);
                top = max(top, s[i][j]);
            }
            top = team_max(top);
            const T shift = top == T(-INFINITY) && !MUTANT(824, "attention: nothing seen yet is no NaN") ? T(0) : top;
            const T shrink = exponential(largest[i] - shift);
            largest[i] = top;
            total[i] *= shrink;
            UNROLL for (int c = 0; c < Tile::kSizeEach; ++c) sum[i][c] *= shrink;
            UNROLL for (int j = 0; j < Tile::kColumnsEach; ++j) {
                s[i][j] = exponential(s[i][j] - shift);
                total[i] += s[i][j];
            }
        }
        Tile::put(shared.weights, s);
        if (!MUTANT(825, "attention: weights and values are there before they are multiplied")) BARRIER();
        Tile::accumulate(shared.weights, shared.key_or_value, sum);
    }
    UNROLL for (int i = 0; i < Tile::kRowsEach; ++i) {
        const T all = team_sum(total[i]);
        const bool any = all != T(0) || MUTANT(826, "attention: a query that sees nothing gets zeros");
        const T inverse = any ? T(1) / all : T(0);
        UNROLL for (int c = 0; c < Tile::kSizeEach; ++c) sum[i][c] *= inverse;
        if (Tile::lane() && !MUTANT(827, "attention: one lane stores a query's logsumexp")) continue;
        const int query = first + Tile::row(i);
        if (query < a.queries || MUTANT(828, "attention: queries past the last have no logsumexp"))
            st(logsumexp + size_t(head) * a.queries + query, any ? largest[i] + logarithm(all) : T(0));
    }
    Tile::store(Head<T>(a, out, head, a.queries, a.value_size), first, sum);
}

// d = g·out (n, heads, queries): a warp a query.
template <class T>
KERNEL_BOUNDS(kThreads, 8)
attention_dots(Sizes a, const T* g, const T* out, T* d) {
    const int row = blockIdx.x * (kThreads / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= a.n * a.heads * a.queries && !MUTANT(831, "attention dots: warps past the last query return")) return;
    const int head = row / a.queries, query = row % a.queries;
    const T* from = Head<const T>(a, g, head, a.queries, a.value_size).row(query);
    const T* other = Head<const T>(a, out, head, a.queries, a.value_size).row(query);
    T sum = 0;
    for (int c = lane; c < a.value_size; c += 32) sum += ld(from + c) * ld(other + c);
    sum = warp_sum(sum);
    if (lane == 0 || MUTANT(832, "attention dots: one lane stores a query's")) st(d + row, sum);
}

template <class T, class Tile>
struct BackwardStorage {
    alignas(16) typename Tile::Row own[Tile::kRows], own_value[Tile::kRows];
    alignas(16) typename Tile::Row other[Tile::kColumns], other_value[Tile::kColumns];
    alignas(16) typename Tile::Weights weights[Tile::kRows];
};

// A block's own rows are queries, and it goes through keys: gq; or, by keys, the other way round: gk and gv. Either way the
// scores are products of own and other, those of g and v products of own_value and other_value.
template <class T, class Tile, bool kByKeys>
KERNEL_BOUNDS(kThreads, 2)
attention_gradient(Sizes a, T scale, const T* g, const T* q, const T* k, const T* v, const T* logsumexp, const T* d, T* result,
                   T* gv) {
    using Storage = BackwardStorage<T, Tile>;
    SHARED(Storage, shared);
    const int rows = kByKeys ? a.keys : a.queries, columns = kByKeys ? a.queries : a.keys;
    const int blocks = ceil_div(rows, Tile::kRows), head = blockIdx.x / blocks, first = blockIdx.x % blocks * Tile::kRows;
    const Head<const T> own(a, kByKeys ? k : q, head, rows, a.size), other(a, kByKeys ? q : k, head, columns, a.size);
    const Head<const T> own_value(a, kByKeys ? v : g, head, rows, a.value_size);
    const Head<const T> other_value(a, kByKeys ? g : v, head, columns, a.value_size);
    Tile::template fetch<Tile::kRows>(shared.own, own, first);
    Tile::template fetch<Tile::kRows>(shared.own_value, own_value, first);

    T sum[Tile::kRowsEach][Tile::kSizeEach], value_sum[Tile::kRowsEach][Tile::kSizeEach];
    UNROLL for (int i = 0; i < Tile::kRowsEach; ++i)
        UNROLL for (int c = 0; c < Tile::kSizeEach; ++c) sum[i][c] = value_sum[i][c] = T(0);
    const int start = a.causal && kByKeys ? first / Tile::kColumns * Tile::kColumns : 0;  // queries before see none of the keys
    const int end = a.causal && !kByKeys ? min(columns, first + Tile::kRows) : columns;
    for (int begin = start; begin < end; begin += Tile::kColumns) {
        if (begin > start && !MUTANT(841, "attention gradient: a tile is multiplied before the next overwrites it")) BARRIER();
        Tile::template fetch<Tile::kColumns>(shared.other, other, begin);
        Tile::template fetch<Tile::kColumns>(shared.other_value, other_value, begin);
        if (!MUTANT(842, "attention gradient: tiles are there before they are multiplied")) BARRIER();
        T p[Tile::kRowsEach][Tile::kColumnsEach], t[Tile::kRowsEach][Tile::kColumnsEach];
        Tile::multiply(shared.own, shared.other, p);
        Tile::multiply(shared.own_value, shared.other_value, t);
        UNROLL for (int i = 0; i < Tile::kRowsEach; ++i)
            UNROLL for (int j = 0; j < Tile::kColumnsEach; ++j) {
                const int row = first + Tile::row(i), column = begin + Tile::column(j);
                const int query = kByKeys ? column : row, key = kByKeys ? row : column;
                const bool seen = visible(a, head, query, key);
                const size_t at = size_t(head) * a.queries + query;
                p[i][j] = seen ? exponential(p[i][j] * scale - ld(logsumexp + at)) : T(0);
                t[i][j] = seen ? p[i][j] * (t[i][j] - ld(d + at)) : T(0);
            }
        if (kByKeys) {
            Tile::put(shared.weights, p);
            if (!MUTANT(843, "attention gradient: a team's p are there before they are multiplied")) WARP_SYNC(kWholeWarp);
            Tile::accumulate(shared.weights, shared.other_value, value_sum);
            if (!MUTANT(844, "attention gradient: p are multiplied before they are overwritten")) WARP_SYNC(kWholeWarp);
        }
        Tile::put(shared.weights, t);
        if (!MUTANT(845, "attention gradient: a team's t are there before they are multiplied")) WARP_SYNC(kWholeWarp);
        Tile::accumulate(shared.weights, shared.other, sum);
    }
    UNROLL for (int i = 0; i < Tile::kRowsEach; ++i)
        UNROLL for (int c = 0; c < Tile::kSizeEach; ++c) sum[i][c] *= scale;
    Tile::store(Head<T>(a, result, head, rows, a.size), first, sum);
    if (kByKeys) Tile::store(Head<T>(a, gv, head, rows, a.value_size), first, value_sum);
}

template <class T, class Tile>
static int forward(const Sizes& a, double scale, const void* q, const void* k, const void* v, void* out, void* logsumexp,
                   uintptr_t stream) {
    return LAUNCH((attention_rows<T, Tile>), ceil_div(a.queries, Tile::kRows) * a.n * a.heads, kThreads,
                  sizeof(ForwardStorage<T, Tile>), stream, a, T(scale), static_cast<const T*>(q), static_cast<const T*>(k),
                  static_cast<const T*>(v), static_cast<T*>(out), static_cast<T*>(logsumexp));
}

template <class T, class Tile>
static int backward(const Sizes& a, double scale, const void* g, const void* q, const void* k, const void* v, const void* out,
                    const void* logsumexp, void* gq, void* gk, void* gv, void* workspace, uintptr_t stream) {
    const T *gy = static_cast<const T*>(g), *query = static_cast<const T*>(q), *key = static_cast<const T*>(k);
    const T *value = static_cast<const T*>(v), *l = static_cast<const T*>(logsumexp);
    T* d = static_cast<T*>(workspace);
    const int heads = a.n * a.heads, bytes = sizeof(BackwardStorage<T, Tile>);
    const auto blocks = [&](int rows) { return ceil_div(rows, Tile::kRows) * heads; };
    if (int error = LAUNCH(attention_dots<T>, ceil_div(heads * a.queries, kThreads / 32), kThreads, 0, stream, a, gy,
                           static_cast<const T*>(out), d))
        return error;
    if (int error = LAUNCH((attention_gradient<T, Tile, false>), blocks(a.queries), kThreads, bytes, stream, a, T(scale), gy,
                           query, key, value, l, d, static_cast<T*>(gq), nullptr))
        return error;
    return LAUNCH((attention_gradient<T, Tile, true>), blocks(a.keys), kThreads, bytes, stream, a, T(scale), gy, query, key,
                  value, l, d, static_cast<T*>(gk), static_cast<T*>(gv));
}

// float64 has half the rows, to fit the same shared memory.
template <int kSize>
using Forward = Tile<float, kSize, 8, kSize == 128 ? 2 : 4>;
template <int kSize>
using Backward = Tile<float, kSize, kSize == 128 ? 4 : 8, 2>;
template <int kSize>
using Double = Tile<double, kSize, 4, 2>;

static bool takes(const Sizes& a, int precision) {
    const int size = max(a.size, a.value_size);
    return a.n > 0 && a.heads > 0 && a.queries > 0 && a.keys > 0 && a.size > 0 && a.value_size > 0 &&
           (precision == kFloat32 ? size <= 128 : precision == kFloat64 && size <= 64);
}

template <class... Pointers>
static bool wide(int size, int value_size, Pointers... p) {
    return size % 4 == 0 && value_size % 4 == 0 && (aligned16(p) && ...);
}

int attention(int precision, int n, int heads, int queries, int keys, int size, int value_size, int causal, int mask_sample,
              int mask_head, int mask_query, int mask_key, double scale, const void* q, const void* k, const void* v,
              const void* mask, void* out, void* logsumexp, uintptr_t stream) {
    const Sizes a{n, heads, queries, keys, size, value_size, causal != 0, wide(size, value_size, q, k, v),
                  {static_cast<const uint8_t*>(mask), mask_sample, mask_head, mask_query, mask_key}};
    if (!takes(a, precision)) return kUnsupported;
    const int largest = max(size, value_size);
    const auto run = precision == kFloat64 ? (largest <= 32 ? forward<double, Double<32>> : forward<double, Double<64>>)
                     : largest <= 32       ? forward<float, Forward<32>>
                     : largest <= 64       ? forward<float, Forward<64>>
                                           : forward<float, Forward<128>>;
    return run(a, scale, q, k, v, out, logsumexp, stream);
}

int attention_backward(int precision, int n, int heads, int queries, int keys, int size, int value_size, int causal,
                       int mask_sample, int mask_head, int mask_query, int mask_key, double scale, const void* g, const void* q,
                       const void* k, const void* v, const void* mask, const void* out, const void* logsumexp, void* gq,
                       void* gk, void* gv, void* workspace, uintptr_t stream) {
    const Sizes a{n, heads, queries, keys, size, value_size, causal != 0, wide(size, value_size, g, q, k, v),
                  {static_cast<const uint8_t*>(mask), mask_sample, mask_head, mask_query, mask_key}};
    if (!takes(a, precision)) return kUnsupported;
    const int largest = max(size, value_size);
    const auto run = precision == kFloat64 ? (largest <= 32 ? backward<double, Double<32>> : backward<double, Double<64>>)
                     : largest <= 32       ? backward<float, Backward<32>>
                     : largest <= 64       ? backward<float, Backward<64>>
                                           : backward<float, Backward<128>>;
    return run(a, scale, g, q, k, v, out, logsumexp, gq, gk, gv, workspace, stream);
}

int64_t attention_workspace(int precision, int n, int heads, int queries) {
    return int64_t(n) * heads * queries * (precision == kFloat64 ? 8 : 4);
}
