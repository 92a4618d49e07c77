"""Sums of columns: the gradient of a bias, over all pixels of a batch.

Bound by memory. NumPy adds one row at a time on one core; here each thread takes a band of rows, in blocks so short that the
rounding error grows with their number and not with that of the rows, and the bands are added in order: deterministic for a
given number of threads.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from tinydiff.kernels.jit import njit

BLOCK = 128  # rows summed straight into one float


@njit(parallel=True)
def _column_sum(x, threads):  # type: ignore[no-untyped-def]
    rows, columns = x.shape
    partial = np.zeros((threads, columns), x.dtype)
    for thread in numba.prange(threads):
        block = np.empty(columns, x.dtype)
        end = rows * (thread + 1) // threads
        for start in range(rows * thread // threads, end, BLOCK):
            block[:] = 0
            for i in range(start, min(start + BLOCK, end)):
                for j in range(columns):
                    block[j] += x[i, j]
            for j in range(columns):
                partial[thread, j] += block[j]
    for thread in range(1, threads):
        partial[0] += partial[thread]
    return partial[0]


def column_sum(x: np.ndarray) -> Any:
    """The sum over the first axis of a C-contiguous float32 matrix; declines other dtypes and matrices of few columns."""
    if x.dtype != np.float32 or x.shape[1] < 8:
        return NotImplemented
    return _column_sum(x, numba.get_num_threads())
