"""Pictures enlarged by two, and the gradient, channels last: copies and sums of whole pixels. Bound by memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from tinydiff.kernels.arrays import Kernel, load, plain, share, store, threads_for
from tinydiff.kernels.launch import unpack
from tinydiff.kernels.memory import empty

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
    """Four pixels to their sum. rows, width: of the result."""
    x, y, rows, width, channels, threads = unpack(args, 6)
    start, stop = share(rows, thread, threads)
    for row in range(start, stop):
        for column in range(width):
            target = (row * width + column) * channels
            upper = (4 * row * width + 2 * column) * channels
            lower = upper + 2 * width * channels
            for c in range(channels):
                above = load(x, upper + c) + load(x, upper + channels + c)
                below = load(x, lower + c) + load(x, lower + channels + c)
                store(y, target + c, above + below)


def upsample_nearest2d(x: np.ndarray) -> Any:
    """x (N, H, W, C) to (N, 2H, 2W, C), each pixel four times. NotImplemented but for float32, C-contiguous, not empty arrays."""
    if not plain(x) or x.ndim != 4:
        return NotImplemented
    n, height, width, channels = x.shape
    y = empty(n, 2 * height, 2 * width, channels)
    threads = min(n * height, threads_for(y.size))
    _enlarge(threads, x, y, n * height, width, channels, threads)
    return y


def upsample_nearest2d_backward(g: np.ndarray) -> Any:
    """The gradient of x from g (N, 2H, 2W, C): the sum of each pixel's four."""
    if not plain(g) or g.ndim != 4 or g.shape[1] % 2 or g.shape[2] % 2:
        return NotImplemented
    n, height, width, channels = g.shape
    x = empty(n, height // 2, width // 2, channels)
    threads = min(n * height // 2, threads_for(g.size))
    _reduce(threads, g, x, n * height // 2, width // 2, channels, threads)
    return x
