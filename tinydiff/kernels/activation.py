"""Activations and their derivatives over flat float32 arrays, each thread taking a part.

One pass over memory each: with the polynomials of `mathfun` inlined, memory bandwidth is what bounds them. SiLU, CLIP's
quick GELU and the tanh form of GELU are one curve, x · sigmoid(x (a + b x²)), so one kernel serves the three. The exact GELU
and its derivative are ½ and an odd polynomial, to 1.3e-7 and 4e-7 absolutely: as exact as 1 + erf is in float32, and no exp.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tinydiff.kernels import mathfun, record
from tinydiff.kernels.arrays import Kernel, load, number, plain, share, store, threads_for
from tinydiff.kernels.jit import njit
from tinydiff.kernels.launch import unpack
from tinydiff.kernels.mathfun import bounded, one_and_exp_of_minus
from tinydiff.kernels.memory import empty

_f = np.float32
SILU = (1.0, 0.0)
QUICK_GELU = (1.702, 0.0)
GELU_TANH = (2 * math.sqrt(2 / math.pi), 2 * math.sqrt(2 / math.pi) * 0.044715)
LARGE = 1 << 16  # elements from which two threads add faster than NumPy's one
EXP, LOG, TANH, SIGMOID, ERF = range(5)


@njit(forceinline=True)
def _near(x):  # type: ignore[no-untyped-def]
    """x within ±100, beyond which no sigmoid here changes, so that x³ can't overflow; NaN stays."""
    x = _f(-100) if _f(-100) > x else x
    return _f(100) if _f(100) < x else x


@Kernel
def _gate(args, thread):  # type: ignore[no-untyped-def]
    x, out, a, b, size, threads = unpack(args, 6)
    a, b = number(a), number(b)
    start, stop = share(size, thread, threads)
    if b:
        for i in range(start, stop):
            v = _near(load(x, i))
            store(out, i, load(x, i) / one_and_exp_of_minus(bounded(v * (a + b * v * v))))
    else:
        for i in range(start, stop):
            store(out, i, load(x, i) / one_and_exp_of_minus(bounded(a * load(x, i))))


@Kernel
def _gate_backward(args, thread):  # type: ignore[no-untyped-def]
    g, x, out, a, b, size, threads = unpack(args, 7)
    a, b = number(a), number(b)
    start, stop = share(size, thread, threads)
    if b:
        for i in range(start, stop):
            v = _near(load(x, i))
            square = b * v * v
            s = mathfun.sigmoid(v * (a + square))
            store(out, i, load(g, i) * (s + v * (a + _f(3) * square) * (s - s * s)))
    else:
        for i in range(start, stop):
            z = bounded(a * load(x, i))
            s = _f(1) / one_and_exp_of_minus(z)
            store(out, i, load(g, i) * s * (_f(1) + z * (_f(1) - s)))


@Kernel
def _gelu(args, thread):  # type: ignore[no-untyped-def]
    x, out, size, threads = unpack(args, 4)
    start, stop = share(size, thread, threads)
    for i in range(start, stop):
        store(out, i, mathfun.gelu(load(x, i)))


@Kernel
def _gelu_backward(args, thread):  # type: ignore[no-untyped-def]
    g, x, out, size, threads = unpack(args, 5)
    start, stop = share(size, thread, threads)
    for i in range(start, stop):
        store(out, i, load(g, i) * mathfun.gelu_slope(load(x, i)))


@Kernel
def _geglu(args, thread):  # type: ignore[no-untyped-def]
    x, out, half, rows, threads = unpack(args, 5)
    start, stop = share(rows, thread, threads)
    for row in range(start, stop):
        value, gate, y = 2 * row * half, (2 * row + 1) * half, row * half
        for i in range(half):
            store(out, y + i, load(x, value + i) * mathfun.gelu(load(x, gate + i)))


@Kernel
def _geglu_backward(args, thread):  # type: ignore[no-untyped-def]
    g, x, out, half, rows, threads = unpack(args, 6)
    start, stop = share(rows, thread, threads)
    for row in range(start, stop):
        value, gate, y = 2 * row * half, (2 * row + 1) * half, row * half
        for i in range(half):
            v = load(x, gate + i)
            store(out, value + i, load(g, y + i) * mathfun.gelu(v))
            store(out, gate + i, load(g, y + i) * load(x, value + i) * mathfun.gelu_slope(v))


@Kernel
def _unary(args, thread):  # type: ignore[no-untyped-def]
    x, out, which, size, threads = unpack(args, 5)
    start, stop = share(size, thread, threads)
    if which == EXP:
        for i in range(start, stop):
            store(out, i, mathfun.exp(load(x, i)))
    elif which == LOG:
        for i in range(start, stop):
            store(out, i, mathfun.log(load(x, i)))
    elif which == TANH:
        for i in range(start, stop):
            store(out, i, mathfun.tanh(load(x, i)))
    elif which == SIGMOID:
        for i in range(start, stop):
            store(out, i, mathfun.sigmoid(load(x, i)))
    else:
        for i in range(start, stop):
            store(out, i, mathfun.erf(load(x, i)))


@Kernel
def _add(args, thread):  # type: ignore[no-untyped-def]
    x, y, out, size, threads = unpack(args, 5)
    start, stop = share(size, thread, threads)
    for i in range(start, stop):
        store(out, i, load(x, i) + load(y, i))


@Kernel
def _add_row(args, thread):  # type: ignore[no-untyped-def]
    """y (length) added to each row of x."""
    x, y, out, length, rows, threads = unpack(args, 6)
    start, stop = share(rows, thread, threads)
    for row in range(start, stop):
        for i in range(length):
            store(out, row * length + i, load(x, row * length + i) + load(y, i))


def _run(kernel: Kernel, inputs: tuple[np.ndarray, ...], *numbers: float) -> Any:
    """A new array like the first input, computed by a kernel of (*inputs, out, *numbers, size, threads)."""
    first = inputs[0]
    if not plain(*inputs) or any(a.shape != first.shape for a in inputs):
        return NotImplemented
    out = empty(*first.shape)
    threads = threads_for(first.size)
    kernel(threads, *inputs, out, *numbers, first.size, threads)
    return out


def exp(x: np.ndarray) -> Any:
    """eˣ, elementwise. This and the functions below return NotImplemented but for float32, C-contiguous, not empty arrays."""
    return _run(_unary, (x,), EXP)


def log(x: np.ndarray) -> Any:
    """The natural logarithm, elementwise."""
    return _run(_unary, (x,), LOG)


def tanh(x: np.ndarray) -> Any:
    """tanh x, elementwise."""
    return _run(_unary, (x,), TANH)


def sigmoid(x: np.ndarray) -> Any:
    """1/(1 + e⁻ˣ), elementwise."""
    return _run(_unary, (x,), SIGMOID)


def erf(x: np.ndarray) -> Any:
    """erf x, elementwise."""
    return _run(_unary, (x,), ERF)


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
    out = empty(*x.shape[:-1], x.shape[-1] // 2)
    threads = threads_for(x.size)
    _geglu(threads, x, out, out.shape[-1], out.size // out.shape[-1], threads)
    return out


def geglu_backward(g: np.ndarray, x: np.ndarray) -> Any:
    """The gradient of x (…, 2C) from g (…, C)."""
    if not plain(g, x) or x.shape != (*g.shape[:-1], 2 * g.shape[-1]):
        return NotImplemented
    out = empty(*x.shape)
    threads = threads_for(x.size)
    _geglu_backward(threads, g, x, out, g.shape[-1], g.size // g.shape[-1], threads)
    return out


def add(x: np.ndarray | float, y: np.ndarray | float) -> Any:
    """x + y for large arrays of one shape, on all threads; in a recording of any size, and y (C,) beside x (…, C)."""
    if not (isinstance(x, np.ndarray) and isinstance(y, np.ndarray)) or (x.size < LARGE and not record.active()):
        return NotImplemented
    if x.shape == y.shape:
        return _run(_add, (x, y))
    if not plain(x, y) or y.shape != x.shape[-1:]:
        return NotImplemented
    out, rows = empty(*x.shape), x.size // y.size
    threads = min(rows, threads_for(x.size))
    _add_row(threads, x, y, out, y.size, rows, threads)
    return out
