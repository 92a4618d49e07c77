"""Activations and their derivatives over flat float32 arrays, each thread taking a part.

One pass over memory each: with the polynomials of `mathfun` inlined, memory bandwidth is what bounds them. SiLU, CLIP's
quick GELU and the tanh form of GELU are one curve, x · sigmoid(x (a + b x²)), so one kernel serves the three; the exact GELU
takes Φ from a tail that keeps its relative accuracy where Φ is small.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tinydiff.kernels import mathfun
from tinydiff.kernels.arrays import Kernel, bits, load, plain, share, store, threads_for
from tinydiff.kernels.jit import njit
from tinydiff.kernels.launch import unpack
from tinydiff.kernels.mathfun import from_bits
from tinydiff.kernels.memory import address

_f = np.float32
SILU = (1.0, 0.0)
QUICK_GELU = (1.702, 0.0)
GELU_TANH = (2 * math.sqrt(2 / math.pi), 2 * math.sqrt(2 / math.pi) * 0.044715)
LARGE = 1 << 16  # elements from which two threads add faster than NumPy's one
_SQRT_HALF, _INV_SQRT_2PI, _HALF = _f(math.sqrt(0.5)), _f(1 / math.sqrt(2 * math.pi)), _f(0.5)


@njit(forceinline=True)
def normal_cdf(x, e):  # type: ignore[no-untyped-def]
    """The normal distribution's Φ(x), given e = exp(-x²/2)."""
    tail = _HALF * e * mathfun.erfc_scaled(abs(x) * _SQRT_HALF)
    return tail if x < _f(0) else _f(1) - tail


@njit(forceinline=True)
def _near(x):  # type: ignore[no-untyped-def]
    """x within ±100, beyond which no sigmoid here changes, so that 0 · x² can't overflow; NaN stays."""
    x = _f(-100) if _f(-100) > x else x
    return _f(100) if _f(100) < x else x


@Kernel
def _gate(args, thread):  # type: ignore[no-untyped-def]
    x, out, a, b, size, threads = unpack(args, 6)
    a, b = from_bits(np.int32(a)), from_bits(np.int32(b))
    start, stop = share(size, thread, threads)
    for i in range(start, stop):
        v = _near(load(x, i))
        store(out, i, load(x, i) * mathfun.sigmoid(v * (a + b * v * v)))


@Kernel
def _gate_backward(args, thread):  # type: ignore[no-untyped-def]
    g, x, out, a, b, size, threads = unpack(args, 7)
    a, b = from_bits(np.int32(a)), from_bits(np.int32(b))
    start, stop = share(size, thread, threads)
    for i in range(start, stop):
        v = _near(load(x, i))
        square = b * v * v
        s = mathfun.sigmoid(v * (a + square))
        store(out, i, load(g, i) * (s + v * (a + _f(3) * square) * (s - s * s)))


@Kernel
def _gelu(args, thread):  # type: ignore[no-untyped-def]
    x, out, size, threads = unpack(args, 4)
    start, stop = share(size, thread, threads)
    for i in range(start, stop):
        v = load(x, i)
        store(out, i, v * normal_cdf(v, mathfun.exp_within(-_HALF * v * v)))


@Kernel
def _gelu_backward(args, thread):  # type: ignore[no-untyped-def]
    g, x, out, size, threads = unpack(args, 5)
    start, stop = share(size, thread, threads)
    for i in range(start, stop):
        v = load(x, i)
        e = mathfun.exp_within(-_HALF * v * v)
        store(out, i, load(g, i) * (normal_cdf(v, e) + v * e * _INV_SQRT_2PI))


@Kernel
def _geglu(args, thread):  # type: ignore[no-untyped-def]
    x, out, half, rows, threads = unpack(args, 5)
    start, stop = share(rows, thread, threads)
    for row in range(start, stop):
        value, gate, y = 2 * row * half, (2 * row + 1) * half, row * half
        for i in range(half):
            v = load(x, gate + i)
            store(out, y + i, load(x, value + i) * v * normal_cdf(v, mathfun.exp_within(-_HALF * v * v)))


@Kernel
def _geglu_backward(args, thread):  # type: ignore[no-untyped-def]
    g, x, out, half, rows, threads = unpack(args, 6)
    start, stop = share(rows, thread, threads)
    for row in range(start, stop):
        value, gate, y = 2 * row * half, (2 * row + 1) * half, row * half
        for i in range(half):
            v = load(x, gate + i)
            e = mathfun.exp_within(-_HALF * v * v)
            cdf = normal_cdf(v, e)
            store(out, value + i, load(g, y + i) * v * cdf)
            store(out, gate + i, load(g, y + i) * load(x, value + i) * (cdf + v * e * _INV_SQRT_2PI))


@Kernel
def _exp(args, thread):  # type: ignore[no-untyped-def]
    x, out, size, threads = unpack(args, 4)
    start, stop = share(size, thread, threads)
    for i in range(start, stop):
        store(out, i, mathfun.exp(load(x, i)))


@Kernel
def _tanh(args, thread):  # type: ignore[no-untyped-def]
    x, out, size, threads = unpack(args, 4)
    start, stop = share(size, thread, threads)
    for i in range(start, stop):
        store(out, i, mathfun.tanh(load(x, i)))


@Kernel
def _sigmoid(args, thread):  # type: ignore[no-untyped-def]
    x, out, size, threads = unpack(args, 4)
    start, stop = share(size, thread, threads)
    for i in range(start, stop):
        store(out, i, mathfun.sigmoid(load(x, i)))


@Kernel
def _erf(args, thread):  # type: ignore[no-untyped-def]
    x, out, size, threads = unpack(args, 4)
    start, stop = share(size, thread, threads)
    for i in range(start, stop):
        store(out, i, mathfun.erf(load(x, i)))


@Kernel
def _add(args, thread):  # type: ignore[no-untyped-def]
    x, y, out, size, threads = unpack(args, 5)
    start, stop = share(size, thread, threads)
    for i in range(start, stop):
        store(out, i, load(x, i) + load(y, i))


def _run(kernel: Kernel, inputs: tuple[np.ndarray, ...], *numbers: float) -> Any:
    """A new array like the first input, computed by a kernel of (*inputs, out, *numbers, size, threads)."""
    first = inputs[0]
    if not plain(*inputs) or any(a.shape != first.shape for a in inputs):
        return NotImplemented
    out = np.empty_like(first)
    threads = threads_for(first.size)
    kernel(threads, *map(address, inputs), address(out), *map(bits, numbers), first.size, threads)
    return out


def exp(x: np.ndarray) -> Any:
    """eˣ, elementwise. This and the functions below return NotImplemented but for float32, C-contiguous, not empty arrays."""
    return _run(_exp, (x,))


def tanh(x: np.ndarray) -> Any:
    """tanh x, elementwise."""
    return _run(_tanh, (x,))


def sigmoid(x: np.ndarray) -> Any:
    """1/(1 + e⁻ˣ), elementwise."""
    return _run(_sigmoid, (x,))


def erf(x: np.ndarray) -> Any:
    """erf x, elementwise."""
    return _run(_erf, (x,))


def silu(x: np.ndarray) -> Any:
    """x · sigmoid(x)."""
    return _run(_gate, (x,), *SILU)


def silu_backward(g: np.ndarray, x: np.ndarray) -> Any:
    """g times the derivative of `silu` at x."""
    return _run(_gate_backward, (g, x), *SILU)


def quick_gelu(x: np.ndarray) -> Any:
    """x · sigmoid(1.702 x)."""
    return _run(_gate, (x,), *QUICK_GELU)


def quick_gelu_backward(g: np.ndarray, x: np.ndarray) -> Any:
    """g times the derivative of `quick_gelu` at x."""
    return _run(_gate_backward, (g, x), *QUICK_GELU)


def gelu(x: np.ndarray, approximate: str = "none") -> Any:
    """x · Φ(x), exactly (`approximate="none"`) or by "tanh"."""
    if approximate == "tanh":
        return _run(_gate, (x,), *GELU_TANH)
    return _run(_gelu, (x,)) if approximate == "none" else NotImplemented


def gelu_backward(g: np.ndarray, x: np.ndarray, approximate: str = "none") -> Any:
    """g times the derivative of `gelu` at x."""
    if approximate == "tanh":
        return _run(_gate_backward, (g, x), *GELU_TANH)
    return _run(_gelu_backward, (g, x)) if approximate == "none" else NotImplemented


def geglu(x: np.ndarray) -> Any:
    """x (…, 2C) to (…, C): the first half of the channels times the exact GELU of the second (Shazeer 2020)."""
    if not plain(x) or x.ndim == 0 or x.shape[-1] % 2:
        return NotImplemented
    out = np.empty((*x.shape[:-1], x.shape[-1] // 2), np.float32)
    threads = threads_for(x.size)
    _geglu(threads, address(x), address(out), out.shape[-1], out.size // out.shape[-1], threads)
    return out


def geglu_backward(g: np.ndarray, x: np.ndarray) -> Any:
    """The gradient of x (…, 2C) from g (…, C)."""
    if not plain(g, x) or x.shape != (*g.shape[:-1], 2 * g.shape[-1]):
        return NotImplemented
    out = np.empty_like(x)
    threads = threads_for(x.size)
    _geglu_backward(threads, address(g), address(x), address(out), g.shape[-1], g.size // g.shape[-1], threads)
    return out


def add(x: np.ndarray, y: np.ndarray) -> Any:
    """x + y for large arrays of one shape, on all threads."""
    return _run(_add, (x, y)) if x.size >= LARGE else NotImplemented
