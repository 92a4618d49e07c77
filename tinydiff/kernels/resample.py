"""Pictures enlarged and reduced by two, channels last: copies and sums of whole pixels. Bound by memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from tinydiff.kernels.arrays import Kernel, bits, load, plain, share, store, threads_for
from tinydiff.kernels.launch import unpack
from tinydiff.kernels.mathfun import from_bits
from tinydiff.kernels.memory import address

_f = np.float32


@Kernel
def _enlarge(args, thread):  # type: ignore[no-untyped-def]
    """Each pixel to four. rows: of all pictures together."""
    x, y, rows, width, channels, threads = unpack(args, 6)
    start, stop = share(rows, thread, threads)
    for row in range(start, stop):
        for column in range(width):
            source = (row * width + column) * channels
            upper = (4 * row * width + 2 * column) * channels
            lower = upper + 2 * width * channels
            for c in range(channels):
                v = load(x, source + c)
                store(y, upper + c, v)
                store(y, upper + channels + c, v)
                store(y, lower + c, v)
                store(y, lower + channels + c, v)


@Kernel
def _reduce(args, thread):  # type: ignore[no-untyped-def]
    """Four pixels to their scaled sum. rows, width: of the result."""
    x, y, rows, width, channels, scale, threads = unpack(args, 7)
    scale = from_bits(np.int32(scale))
    start, stop = share(rows, thread, threads)
    for row in range(start, stop):
        for column in range(width):
            target = (row * width + column) * channels
            upper = (4 * row * width + 2 * column) * channels
            lower = upper + 2 * width * channels
            for c in range(channels):
                above = load(x, upper + c) + load(x, upper + channels + c)
                below = load(x, lower + c) + load(x, lower + channels + c)
                store(y, target + c, scale * (above + below))


def upsample_nearest2d(x: np.ndarray) -> Any:
    """x (N, H, W, C) to (N, 2H, 2W, C), each pixel four times. NotImplemented but for float32, C-contiguous, not empty arrays."""
    if not plain(x) or x.ndim != 4:
        return NotImplemented
    n, height, width, channels = x.shape
    y = np.empty((n, 2 * height, 2 * width, channels), np.float32)
    threads = min(n * height, threads_for(y.size))
    _enlarge(threads, address(x), address(y), n * height, width, channels, threads)
    return y


def _quarter(x: np.ndarray, scale: float) -> Any:
    if not plain(x) or x.ndim != 4 or x.shape[1] % 2 or x.shape[2] % 2:
        return NotImplemented
    n, height, width, channels = x.shape
    y = np.empty((n, height // 2, width // 2, channels), np.float32)
    threads = min(n * height // 2, threads_for(x.size))
    _reduce(threads, address(x), address(y), n * height // 2, width // 2, channels, bits(scale), threads)
    return y


def upsample_nearest2d_backward(g: np.ndarray) -> Any:
    """The gradient of x from g (N, 2H, 2W, C): the sum of each pixel's four."""
    return _quarter(g, 1.0)


def avg_pool2x2(x: np.ndarray) -> Any:
    """x (N, 2H, 2W, C) to (N, H, W, C): the mean of each 2×2 pixels."""
    return _quarter(x, 0.25)
