"""Softmax and log-softmax over the last axis: three short loops over a row while it is in the first-level cache.

Bound by exp for short rows and by memory for long ones. Rows are shared among the threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tinydiff.kernels.arrays import Kernel, load, plain, share, store, threads_for
from tinydiff.kernels.jit import njit
from tinydiff.kernels.launch import unpack
from tinydiff.kernels.mathfun import exp_within, from_bits, log, to_bits
from tinydiff.kernels.memory import empty, read

_f = np.float32


@njit(forceinline=True)
def _flip(b):  # type: ignore[no-untyped-def]
    """Bits of a float32 as an int32 of the same order, and back. Such integers' maximum vectorises, that of floats doesn't."""
    return np.int32(b ^ (np.int32(b >> 31) & np.int32(0x7FFFFFFF)))


@njit(forceinline=True)
def greatest(x, at, columns):  # type: ignore[no-untyped-def]
    """The greatest of a row; NaN there is left for the sum to find."""
    found = _flip(to_bits(load(x, at)))
    for c in range(columns):
        found = max(found, _flip(to_bits(load(x, at + c))))
    return from_bits(_flip(found))


@Kernel
def _softmax(args, thread):  # type: ignore[no-untyped-def]
    x, y, rows, columns, threads = unpack(args, 5)
    start, stop = share(rows, thread, threads)
    for row in range(start, stop):
        at = row * columns
        top = greatest(x, at, columns)
        total = _f(0)
        for c in range(columns):
            e = exp_within(load(x, at + c) - top)
            total += e
            store(y, at + c, e)
        scale = _f(1) / total
        for c in range(columns):
            store(y, at + c, read(y, at + c) * scale)


@Kernel
def _log_softmax(args, thread):  # type: ignore[no-untyped-def]
    x, y, rows, columns, threads = unpack(args, 5)
    start, stop = share(rows, thread, threads)
    for row in range(start, stop):
        at = row * columns
        top = greatest(x, at, columns)
        total = _f(0)
        for c in range(columns):
            total += exp_within(load(x, at + c) - top)
        total = log(total)
        for c in range(columns):
            store(y, at + c, (load(x, at + c) - top) - total)


@Kernel
def _softmax_backward(args, thread):  # type: ignore[no-untyped-def]
    g, y, gx, rows, columns, threads = unpack(args, 6)
    start, stop = share(rows, thread, threads)
    for row in range(start, stop):
        at = row * columns
        total = _f(0)
        for c in range(columns):
            total += load(g, at + c) * load(y, at + c)
        for c in range(columns):
            store(gx, at + c, load(y, at + c) * (load(g, at + c) - total))


@Kernel
def _log_softmax_backward(args, thread):  # type: ignore[no-untyped-def]
    g, y, gx, rows, columns, threads = unpack(args, 6)
    start, stop = share(rows, thread, threads)
    for row in range(start, stop):
        at = row * columns
        total = _f(0)
        for c in range(columns):
            total += load(g, at + c)
        for c in range(columns):
            store(gx, at + c, load(g, at + c) - exp_within(load(y, at + c)) * total)


def _rows(kernel: Kernel, *inputs: np.ndarray) -> Any:
    first = inputs[0]
    if not plain(*inputs) or first.ndim == 0 or any(a.shape != first.shape for a in inputs):
        return NotImplemented
    out = empty(*first.shape)
    columns = first.shape[-1]
    rows = first.size // columns
    threads = min(rows, threads_for(first.size, 1 << 15))
    kernel(threads, *inputs, out, rows, columns, threads)
    return out


def softmax(x: np.ndarray) -> Any:
    """softmax over the last axis. This and the functions below decline all but float32, C-contiguous, not empty arrays."""
    return _rows(_softmax, x)


def softmax_backward(g: np.ndarray, y: np.ndarray) -> Any:
    """The gradient of x from g, the gradient of y = softmax(x)."""
    return _rows(_softmax_backward, g, y)


def log_softmax(x: np.ndarray) -> Any:
    """log softmax over the last axis."""
    return _rows(_log_softmax, x)


def log_softmax_backward(g: np.ndarray, y: np.ndarray) -> Any:
    """The gradient of x from g, the gradient of y = log softmax(x)."""
    return _rows(_log_softmax_backward, g, y)
