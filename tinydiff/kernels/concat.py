"""Joining and parting channels: the skip connections of a UNet. Bound by memory; all threads copy.

Parting makes contiguous pieces, where slices would be views that every later kernel had to copy on one core.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tinydiff.kernels.arrays import Kernel, share, threads_for
from tinydiff.kernels.launch import unpack
from tinydiff.kernels.memory import address, copy, empty


@Kernel
def _copy_columns(args, thread):  # type: ignore[no-untyped-def]
    """`count` floats of each row, from rows `s_stride` apart to rows `t_stride` apart."""
    source, s_stride, target, t_stride, count, rows, threads = unpack(args, 7)
    start, stop = share(rows, thread, threads)
    for i in range(start, stop):
        copy(target + 4 * i * t_stride, source + 4 * i * s_stride, count)


def _copy(source: np.ndarray, first: int, target: np.ndarray, start: int, count: int) -> None:
    """target[:, start : start + count] = source[:, first : first + count]"""
    rows, threads = len(source), threads_for(len(source) * count)
    places = address(source) + 4 * first, source.shape[1], address(target) + 4 * start, target.shape[1]
    _copy_columns(threads, *places, count, rows, threads)


def _ready(*arrays: np.ndarray) -> bool:
    return all(a.dtype == np.float32 and a.flags.c_contiguous for a in arrays) and math.prod(arrays[0].shape[:-1]) > 0


def _rows(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, x.shape[-1])


def concat_last(arrays: Sequence[np.ndarray]) -> Any:
    """C-contiguous float32 arrays joined along the last axis, which is not empty in any; declines others."""
    if not _ready(*arrays) or not all(a.shape[-1] for a in arrays):
        return NotImplemented
    out = empty(*arrays[0].shape[:-1], sum(a.shape[-1] for a in arrays))
    start = 0
    for a in arrays:
        _copy(_rows(a), 0, _rows(out), start, a.shape[-1])
        start += a.shape[-1]
    return out


def split_last(x: np.ndarray, sizes: Sequence[int], needs: Sequence[bool]) -> Any:
    """A C-contiguous float32 array parted along the last axis into pieces of positive `sizes`; None where not needed."""
    if not _ready(x) or not all(sizes):
        return NotImplemented
    pieces: list[np.ndarray | None] = []
    first = 0
    for size, need in zip(sizes, needs):
        piece = empty(*x.shape[:-1], size) if need else None
        if piece is not None:
            _copy(_rows(x), first, _rows(piece), 0, size)
        pieces.append(piece)
        first += size
    return tuple(pieces)
