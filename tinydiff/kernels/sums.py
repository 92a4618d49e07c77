"""Sums over neighbouring axes but the last: gradients of biases and of whatever was broadcast.

Small ones as a product with ones: where rows are narrow BLAS takes a tenth of the time of NumPy's own sum. Numba is imported
for the large ones only.
"""

from __future__ import annotations

import importlib
import math
from functools import lru_cache
from typing import Any

import numpy as np

LARGE = 8192  # elements from which Numba's kernel is asked
NARROW = 8  # columns under which NumPy is as fast
ROWS = 1024  # at most by a product: it adds them one after the other in the working type, and errors grow with their number


@lru_cache(64)
def _ones(count: int, dtype: np.dtype) -> np.ndarray:
    return np.ones(count, dtype)


def sum_axes(x: np.ndarray, axes: tuple[int, ...]) -> Any:
    """The sum over neighbouring `axes`, not the last, of C-contiguous floats; declines the rest."""
    if not axes or axes[-1] - axes[0] != len(axes) - 1 or axes[-1] == x.ndim - 1:
        return NotImplemented
    if x.dtype.kind != "f" or not x.size or not x.flags.c_contiguous:
        return NotImplemented
    before, after = x.shape[: axes[0]], x.shape[axes[-1] + 1 :]
    return sum_rows(x.reshape(math.prod(before), -1, math.prod(after))).reshape(before + after)


def sum_rows(x: np.ndarray) -> np.ndarray:
    """The sums (N, columns) over the rows of C-contiguous floats x (N, rows, columns)."""
    if x.size >= LARGE and x.shape[2] >= NARROW and x.dtype == np.float32:
        return importlib.import_module("tinydiff.kernels.reduce").sum_rows(x)
    return _ones(x.shape[1], x.dtype) @ x if 1 < x.shape[1] <= ROWS else x.sum(1)
