"""Sums over leading or middle axes: gradients of biases and of whatever was broadcast.

Bound by memory. NumPy adds one row at a time on one core; here the threads share the bands of rows, each summed in blocks so
short that rounding errors grow with their number and not with that of the rows. Bands are added in order, so the result is
the same for the same number of threads.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np

from tinydiff.kernels.jit import njit

BLOCK = 128  # rows summed straight into one float
NARROW = 8  # columns under which NumPy is as fast


@njit(parallel=True)
def _sum_middle(x, bands):  # type: ignore[no-untyped-def]
    outer, rows, columns = x.shape
    partial = np.zeros((outer * bands, columns), x.dtype)
    for task in numba.prange(outer * bands):
        n, band = task // bands, task % bands
        block = np.empty(columns, x.dtype)
        end = rows * (band + 1) // bands
        for start in range(rows * band // bands, end, BLOCK):
            block[:] = 0
            for i in range(start, min(start + BLOCK, end)):
                for j in range(columns):
                    block[j] += x[n, i, j]
            for j in range(columns):
                partial[task, j] += block[j]
    total = np.empty((outer, columns), x.dtype)
    for n in range(outer):
        total[n] = partial[n * bands]
        for band in range(1, bands):
            total[n] += partial[n * bands + band]
    return total


def sum_axes(x: np.ndarray, axes: tuple[int, ...]) -> Any:
    """The sum over neighbouring `axes`, not the last, of C-contiguous float32; declines the rest, and few columns."""
    if x.dtype != np.float32 or not x.flags.c_contiguous or not x.size or not axes:
        return NotImplemented
    first, last = axes[0], axes[-1]
    columns = math.prod(x.shape[last + 1 :])
    if last - first + 1 != len(axes) or columns < NARROW:
        return NotImplemented
    outer = math.prod(x.shape[:first])
    threads = numba.get_num_threads()
    total = _sum_middle(x.reshape(outer, -1, columns), 1 if outer >= threads else threads)
    return total.reshape(x.shape[:first] + x.shape[last + 1 :])
