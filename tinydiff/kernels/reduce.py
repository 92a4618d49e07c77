"""Sums of rows, for `sums`.

Bound by memory. NumPy adds one row at a time on one core; here the threads share the bands of rows, each summed in blocks so
short that rounding errors grow with their number and not with that of the rows. Bands are added in order, so the result is
the same for the same number of threads.
"""

from __future__ import annotations

import numba
import numpy as np

from tinydiff.kernels.jit import njit

BLOCK = 128  # rows summed straight into one float


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


def sum_rows(x: np.ndarray) -> np.ndarray:
    """The sums (N, columns) over the rows of C-contiguous float32 x (N, rows, columns)."""
    threads = numba.get_num_threads()
    return _sum_middle(x, 1 if len(x) >= threads else threads)
