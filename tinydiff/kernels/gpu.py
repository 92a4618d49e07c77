"""What would be a chain of array calls on a GPU, each a pass over memory, as one kernel that CuPy compiles on its first use.

The bodies are CUDA C++ for `cupy.ElementwiseKernel` and `cupy.ReductionKernel`, which take care of launches, strides and
broadcasting; on the simulated device g++ compiles them. Sums that a GPU's threads would share are made in one order, so that
results repeat to the bit.
"""

from __future__ import annotations

import math
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from tinydiff.backend import Array, array_module, device_of
from tinydiff.kernels import cuda

PREAMBLE = """
template <typename T> __device__ T logistic(T x) { return T(1) / (T(1) + exp(-x)); }

// Within 800 of 0, beyond which no slope here changes and no product of 0 and infinity can arise; NaN stays.
template <typename T> __device__ T near(T x) { return x < T(-800) ? T(-800) : x > T(800) ? T(800) : x; }

// x logistic(a x), and its slope.
template <typename T> __device__ T gate(T x, T a) { return x / (T(1) + exp(-a * x)); }
template <typename T> __device__ T gate_slope(T x, T a) {
    const T v = near(a * x), s = logistic(v);
    return s * (T(1) + v * (T(1) - s));
}

// The normal distribution's, for the exact GELU.
template <typename T> __device__ T normal_sum(T x) { return T(0.5) * (T(1) + erf(x * T(0.70710678118654752))); }
template <typename T> __device__ T gelu_slope(T x) {
    const T v = near(x);
    return normal_sum(v) + v * exp(T(-0.5) * v * v) * T(0.39894228040143268);
}

// sqrt(2 / pi) (x + 0.044715 x^3), for the GELU by tanh.
template <typename T> __device__ T bent(T x) { return T(0.79788456080286536) * (x + T(0.044715) * x * x * x); }
template <typename T> __device__ T gelu_tanh_slope(T x) {
    const T v = near(x), t = tanh(bent(v));
    const T rise = T(0.79788456080286536) * (T(1) + T(3 * 0.044715) * v * v);
    return T(0.5) * (T(1) + t) + T(0.5) * v * (T(1) - t * t) * rise;
}

// SplitMix64's number i, the upper 53 bits: see tinydiff/random.py.
__device__ long long drawn(long long i, long long seed) {
    unsigned long long z = (i + 1ull) * 0x9E3779B97F4A7C15ull + seed;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return (z ^ (z >> 31)) >> 11;
}
"""


class Body(NamedTuple):
    """Parameters and operation of an elementwise kernel."""

    inputs: str
    outputs: str
    operation: str


BODIES = {
    "sigmoid": Body("T x", "T y", "y = logistic(x)"),
    "sigmoid_backward": Body("T g, T y", "T gx", "gx = g * y * (T(1) - y)"),
    "tanh_backward": Body("T g, T y", "T gx", "gx = g * (T(1) - y * y)"),
    "relu_backward": Body("T g, T x", "T gx", "gx = g * T(x > T(0))"),
    "silu": Body("T x", "T y", "y = gate(x, T(1))"),
    "silu_backward": Body("T g, T x", "T gx", "gx = g * gate_slope(x, T(1))"),
    "quick_gelu": Body("T x", "T y", "y = gate(x, T(1.702))"),
    "quick_gelu_backward": Body("T g, T x", "T gx", "gx = g * gate_slope(x, T(1.702))"),
    "gelu": Body("T x", "T y", "y = x * normal_sum(x)"),
    "gelu_backward": Body("T g, T x", "T gx", "gx = g * gelu_slope(x)"),
    "gelu_tanh": Body("T x", "T y", "y = x * T(0.5) * (T(1) + tanh(bent(x)))"),
    "gelu_tanh_backward": Body("T g, T x", "T gx", "gx = g * gelu_tanh_slope(x)"),
    # A row of x is a value and a gate, `half` each.
    "geglu": Body(
        "raw T x, int64 half",
        "T y",
        "const long long at = i / half * 2 * half + i % half; y = x[at] * x[at + half] * normal_sum(x[at + half])",
    ),
    "geglu_backward": Body(
        "raw T g, raw T x, int64 half",
        "T gx",
        """
        const long long row = i / (2 * half), c = i % (2 * half);
        if (c < half) {
            gx = g[row * half + c] * x[i + half] * normal_sum(x[i + half]);
        } else {
            gx = g[row * half + c - half] * x[i - half] * gelu_slope(x[i]);
        }
        """,
    ),
    "drop": Body("T x, int64 seed, int64 least, float64 scale", "T y", "y = drawn(i, seed) < least ? T(0) : x * T(scale)"),
    "mse_backward": Body("T g, T x, T y, float64 factor", "T gx", "gx = g * T(factor) * (x - y)"),
    # Of x (outer, n, inner) what index (outer, m, inner) names along the middle.
    "gather": Body(
        "raw T x, S index, int64 n, int64 m, int64 inner",
        "T y",
        "y = x[(i / inner / m * n + index) * inner + i % inner]",
    ),
    # The gradient for m = 1, where nothing is named twice.
    "gather_backward": Body(
        "raw T g, raw S index, int64 n, int64 inner",
        "T gx",
        """
        const long long from = i / inner / n * inner + i % inner;
        gx = index[from] == i / inner % n ? g[from] : T(0)
        """,
    ),
    # Images of `width` by any height: batch and height are one axis, as a row of the small one is two of the large one.
    "upsample": Body(
        "raw T x, int64 width, int64 channels",
        "T y",
        """
        const long long pixel = i / channels, row = pixel / (2 * width), column = pixel % (2 * width);
        y = x[(row / 2 * width + column / 2) * channels + i % channels]
        """,
    ),
    "upsample_backward": Body(
        "raw T g, int64 width, int64 channels",
        "T gx",
        """
        const long long pixel = i / channels, row = pixel / width, column = pixel % width, below = 2 * width * channels;
        const long long at = (row * 2 * (2 * width) + column * 2) * channels + i % channels;
        gx = (g[at] + g[at + channels]) + (g[at + below] + g[at + below + channels])
        """,
    ),
    # Add slices of src (outer, n, inner) to result (outer, rows, inner): slice order[j] to row target[j]. The target is sorted,
    # so that the slices for one row are neighbours, and who stands at the first of them adds them all, in their old order.
    "scatter_rows": Body(
        "raw T src, raw int64 order, raw int64 target, int64 n, int64 rows, int64 inner",
        "raw T result",
        """
        const long long c = i % inner, j = i / inner % n, outer = i / inner / n, row = target[j];
        if (j == 0 || target[j - 1] != row) {
            T total = result[(outer * rows + row) * inner + c];
            for (long long k = j; k < n && target[k] == row; ++k) total += src[(outer * n + order[k]) * inner + c];
            result[(outer * rows + row) * inner + c] = total;
        }
        """,
    ),
}


class Sum(NamedTuple):
    """Parameters and term of a kernel that adds up a term for each element, in float64."""

    inputs: str
    outputs: str
    term: str


SUMS = {
    "sum_of_squares": Sum("T x", "float64 total", "double(x) * double(x)"),
    "squared_error": Sum("T x, T y", "T total", "double(x - y) * double(x - y)"),
}


@cache
def _kernel(xp: ModuleType, name: str) -> Any:
    if name in SUMS:
        return xp.ReductionKernel(*SUMS[name], "a + b", "total = a", "0", name, reduce_type="double", preamble=PREAMBLE)
    return xp.ElementwiseKernel(*BODIES[name], name, preamble=PREAMBLE)


@cache
def _can_compile() -> bool:
    from tinydiff.cudasim import build

    try:
        return bool(build.compiler())
    except RuntimeError:
        return False


def available(array: Array) -> bool:
    """Whether kernels can be compiled for where `array` is: on a GPU, or on the simulated one if it is on and there is a g++."""
    device = device_of(array)
    return device == "cuda" or (device == "cudasim" and cuda.simulating() and _can_compile())


def run(name: str, *arguments: Any) -> Any:
    """The output of a kernel, of the shape that its inputs have together. NotImplemented where it can't be compiled."""
    return _kernel(array_module(arguments[0]), name)(*arguments) if available(arguments[0]) else NotImplemented


def _into(name: str, shape: tuple[int, ...], array: Array, *arguments: Any) -> Any:
    """The output of a kernel whose inputs are raw."""
    if not available(array):
        return NotImplemented
    xp = array_module(array)
    return _kernel(xp, name)(array, *arguments, xp.empty(shape, array.dtype))


def mse_loss(x: Array, y: Array) -> Any:
    """The mean of (x - y)²: see `ops.mse_loss`."""
    if x.shape != y.shape or not x.size:
        return NotImplemented
    total = run("squared_error", x, y)
    return total if total is NotImplemented else total * x.dtype.type(1 / x.size)


def mse_loss_backward(g: Array, x: Array, y: Array) -> Any:
    """The gradient of x; that of y is its negative."""
    return run("mse_backward", g, x, y, 2 / x.size)


def gather(x: Array, index: Array, axis: int) -> Any:
    """`numpy.take_along_axis`, for indices that are in range."""
    if not index.size:
        return NotImplemented
    return _into("gather", index.shape, x, index, x.shape[axis], index.shape[axis], math.prod(index.shape[axis + 1 :]))


def gather_backward(g: Array, shape: tuple[int, ...], index: Array, axis: int) -> Any:
    """The gradient of x of `shape`, where one entry is gathered along the axis, as for a class; else scattered sums are due."""
    if index.shape[axis] != 1 or not index.size:
        return NotImplemented
    return _into("gather_backward", shape, g, index, shape[axis], math.prod(shape[axis + 1 :]))


def geglu(x: Array) -> Any:
    """x (…, 2C) to (…, C): see `ops.geglu`."""
    if x.ndim == 0 or x.shape[-1] % 2:
        return NotImplemented
    half = x.shape[-1] // 2
    return _into("geglu", (*x.shape[:-1], half), x, half)


def geglu_backward(g: Array, x: Array) -> Any:
    """The gradient of x (…, 2C) from g (…, C)."""
    return _into("geglu_backward", x.shape, g, x, g.shape[-1])


def upsample_nearest2d(x: Array) -> Any:
    """(N, H, W, C) to (N, 2H, 2W, C)."""
    n, h, w, c = x.shape
    return _into("upsample", (n, 2 * h, 2 * w, c), x, w, c)


def upsample_nearest2d_backward(g: Array) -> Any:
    """(N, 2H, 2W, C) to (N, H, W, C): sums of four."""
    n, h, w, c = g.shape
    return _into("upsample_backward", (n, h // 2, w // 2, c), g, w // 2, c)


def _scatter(result: Array, src: Array, target: Array, outer: int, rows: int, inner: int) -> Array:
    """Add `src` to `result`, in place: see the body. `target` need not be sorted."""
    xp = array_module(result)
    target = target.ravel().astype(np.int64, copy=False)
    order = xp.argsort(target)  # CuPy's is stable
    n = target.size
    if src.size:
        kernel = _kernel(xp, "scatter_rows")
        kernel(src, order, xp.take(target, order), n, rows, inner, result, size=outer * n * inner)
    return result


def untake(x: Array, shape: tuple[int, ...], indices: Array, axis: int) -> Any:
    """Zeros of `shape` with slices of `x` added at `indices` along `axis`, in their order."""
    if not available(x):
        return NotImplemented
    result = array_module(x).zeros(shape, x.dtype)
    outer, inner = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
    return _scatter(result, x, indices, outer, shape[axis], inner)


def scatter_add(x: Array, src: Array, index: Array, axis: int) -> Any:
    """`x` with each of `src` added at the place along `axis` that `index` names, in their order."""
    if not available(x):
        return NotImplemented
    where = list(array_module(x).ogrid[tuple(slice(n) for n in index.shape)])
    where[axis] = index
    place = where[0]
    for n, along in zip(x.shape[1:], where[1:]):
        place = place * n + along
    return _scatter(x.copy(), src, place, 1, x.size, 1)


LONG = 1024  # rows from which a sum over them is cut


def sum_rows(x: Array, axes: tuple[int, ...]) -> Any:
    """The sum over the leading axes, in two steps.

    A bias gradient has few results and a long sum for each, and CuPy gives a result (or 32 neighbours) one block of threads. So
    some hundred parts of the rows are summed first. NotImplemented where that would not help.
    """
    rows = math.prod(x.shape[: len(axes)])
    if axes != tuple(range(len(axes))) or len(axes) == x.ndim or rows < LONG or not x.flags.c_contiguous or x.dtype.kind != "f":
        return NotImplemented
    parts = math.gcd(rows, 128)
    if parts == 1 or not available(x):
        return NotImplemented
    return x.reshape(parts, rows // parts, -1).sum(axis=1).sum(axis=0).reshape(x.shape[len(axes) :])
