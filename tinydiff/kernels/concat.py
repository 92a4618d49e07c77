"""Joining and parting channels: the skip connections of a UNet. Bound by memory; all threads copy.

Parting makes contiguous pieces, where slices would be views that every later kernel had to copy on one core.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numba
import numpy as np

from tinydiff.kernels.jit import njit


@njit(parallel=True)
def _copy_columns(source, first, target, start, count):  # type: ignore[no-untyped-def]
    """target[:, start : start + count] = source[:, first : first + count]"""
    for i in numba.prange(source.shape[0]):
        for j in range(count):
            target[i, start + j] = source[i, first + j]


def _ready(*arrays: np.ndarray) -> bool:
    return all(a.dtype == np.float32 and a.flags.c_contiguous for a in arrays) and math.prod(arrays[0].shape[:-1]) > 0


def _rows(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, x.shape[-1])


def concat_last(arrays: Sequence[np.ndarray]) -> Any:
    """C-contiguous float32 arrays joined along the last axis, which is not empty in any; declines others."""
    if not _ready(*arrays) or not all(a.shape[-1] for a in arrays):
        return NotImplemented
    out = np.empty((*arrays[0].shape[:-1], sum(a.shape[-1] for a in arrays)), np.float32)
    start = 0
    for a in arrays:
        _copy_columns(_rows(a), 0, _rows(out), start, a.shape[-1])
        start += a.shape[-1]
    return out


def split_last(x: np.ndarray, sizes: Sequence[int], needs: Sequence[bool]) -> Any:
    """A C-contiguous float32 array parted along the last axis into pieces of positive `sizes`; None where not needed."""
    if not _ready(x) or not all(sizes):
        return NotImplemented
    pieces: list[np.ndarray | None] = []
    first = 0
    for size, need in zip(sizes, needs):
        piece = np.empty((*x.shape[:-1], size), np.float32) if need else None
        if piece is not None:
            _copy_columns(_rows(x), first, _rows(piece), 0, size)
        pieces.append(piece)
        first += size
    return tuple(pieces)
