"""Convolution's three directions on float32 arrays: which algorithm a shape gets, and the call.

`algorithm` names the choice, and each function takes `force=` to override it.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from tinydiff.kernels import direct, winograd
from tinydiff.kernels.launch import launch
from tinydiff.kernels.memory import address, scratch
from tinydiff.kernels.microkernel import LANES, ROWS, WIDTH

Pair = tuple[int, int]
Padding = tuple[Pair, Pair]

SLAB = 64 * 1024  # floats: the input under a band of rows, together with what it is multiplied with, stays in L2
TILES = 256  # of Winograd's, at ROWS channels in all: TODO
SMALL = 200_000  # multiplications under which a second thread costs more than it brings


def _threads(items: int, work: int) -> int:
    return 1 if work < SMALL else max(1, min(numba.get_num_threads(), items))


def _ready(*arrays: np.ndarray | None) -> bool:
    return all(a is None or (a.dtype == np.float32 and a.size > 0) for a in arrays)


def _band(n: int, ho: int, row: int) -> int:
    """Output rows that a thread takes at a time: as many as fit the slab, but enough bands for every thread."""
    fair = -(-ho * n // numba.get_num_threads()) if n < numba.get_num_threads() else ho
    return max(1, min(ho, fair, SLAB // max(1, row)))


def _winograd_block(tiles: int, threads: int, channels: int) -> int:
    """Tiles that a thread takes at a time."""
    share = -(-tiles // threads)
    fitting = max(ROWS, TILES * ROWS // max(1, channels))
    return -(-share // (-(-share // fitting) * ROWS)) * ROWS


def _winograd_forward(
    x: np.ndarray, w: np.ndarray, bias: Any, residual: Any, y: np.ndarray, size: Pair, first: Pair
) -> None:
    n, height, width, c = x.shape
    o = w.shape[3]
    tiles = n * -(-size[0] // winograd.TILE) * -(-size[1] // winograd.TILE)
    threads = _threads(tiles // ROWS, n * size[0] * size[1] * 9 * c * o)
    block = _winograd_block(tiles, threads, c + o)
    padded, points = -(-o // WIDTH) * WIDTH, winograd.POINTS**2
    _keep, (packed, u, v, m) = scratch(
        9 * c * padded,
        points * c * padded,
        threads * points * (block * -(-c // LANES) * LANES + LANES),
        threads * points * (block * padded + LANES),
    )
    bias_step = 0 if bias is None or bias.ndim == 1 else o
    launch(winograd.transform_weights, threads, address(w), *(step // 4 for step in w.strides), c, o, packed, u, threads)
    launch(
        winograd.forward, threads, address(x), address(bias), bias_step, address(residual), address(y), u, v, m,
        n, height, width, c, *first, *size, o, block, threads,
    )  # fmt: skip


def _winograd_weight_grad(x: np.ndarray, g: np.ndarray, first: Pair, dw: np.ndarray) -> None:
    (n, height, width, c), (_, ho, wo, o) = x.shape, g.shape
    tiles = n * -(-ho // winograd.TILE) * -(-wo // winograd.TILE)
    threads = _threads(tiles // ROWS, n * ho * wo * 9 * c * o)
    block = _winograd_block(tiles, threads, c + o)
    padded, points = -(-o // WIDTH) * WIDTH, winograd.POINTS**2
    _keep, (sums, v, d) = scratch(
        threads * points * padded * -(-c // winograd.COLUMNS) * winograd.COLUMNS,
        threads * points * (block * -(-c // LANES) * LANES + LANES),
        threads * points * (block * padded + LANES),
    )
    launch(
        winograd.weight_grad, threads, address(x), address(g), sums, v, d,
        n, height, width, c, *first, ho, wo, o, block, threads,
    )  # fmt: skip
    launch(winograd.transform_sums, threads, sums, address(dw), c, o, threads, threads)


def _forward(
    x: np.ndarray, w: np.ndarray, bias: Any, residual: Any, y: np.ndarray, size: Pair, stride: Pair, first: Pair, place: Any
) -> None:
    """w may have any strides; `first` is (top, left) padding, which may be negative; `place` is where y's pixels lie."""
    n, height, width, c = x.shape
    kh, kw, _, o = w.shape
    gathered = kw * c < 16 and kh > 1
    band = _band(n, size[0], stride[0] * ((size[1] - 1) * stride[1] + kw) * c)
    threads = _threads(n * -(-size[0] // band), n * size[0] * size[1] * kh * kw * c * o)
    slab = ((band - 1) * stride[0] + kh) * ((size[1] - 1) * stride[1] + kw) * c
    _keep, work = scratch(
        -(-o // WIDTH) * WIDTH * kh * kw * c, threads * slab, threads * band * size[1] * kh * kw * c if gathered else 0
    )
    bias_step = 0 if bias is None or bias.ndim == 1 else o
    direct.pack(address(w), *(step // 4 for step in w.strides), kh, kw, c, o, work[0])
    launch(
        direct.forward, threads, address(x), address(bias), bias_step, address(residual), address(y), *work,
        n, height, width, c, kh, kw, *stride, *first, *size, o, *place, band, gathered, threads,
    )  # fmt: skip


def conv2d(
    x: np.ndarray,
    w: np.ndarray,
    bias: np.ndarray | None = None,
    residual: np.ndarray | None = None,
    *,
    stride: Pair = (1, 1),
    padding: Padding = ((0, 0), (0, 0)),
    force: str | None = None,
) -> Any:
    """x (N, H, W, C) with w (KH, KW, C, O), plus bias (O,) or (N, O) and residual (N, Ho, Wo, O)."""
    if not _ready(x, w, bias, residual):
        return NotImplemented
    x, bias, residual = (None if a is None else np.ascontiguousarray(a) for a in (x, bias, residual))
    (n, height, width, _), (kh, kw, _, o) = x.shape, w.shape
    (top, bottom), (left, right) = padding
    size = (height + top + bottom - kh) // stride[0] + 1, (width + left + right - kw) // stride[1] + 1
    y = np.empty((n, *size, o), np.float32)
    if force == "winograd_f4":
        _winograd_forward(x, w, bias, residual, y, size, (top, left))
        return y
    _forward(x, w, bias, residual, y, size, stride, (top, left), (0, size[0] * size[1] * o, size[1] * o, o))
    return y


def conv2d_input_grad(g: np.ndarray, w: np.ndarray, *, input_size: Pair, stride: Pair, padding: Padding, force: str | None = None) -> Any:
    """g (N, Ho, Wo, O) with w (KH, KW, C, O) give (N, *input_size, C).

    The input's pixels fall into stride² classes, and each class is an ordinary stride-1 convolution of g with the taps
    that reach it: no multiplication with the zeros that a transposed convolution inserts.
    """
    if not _ready(g, w):
        return NotImplemented
    g = np.ascontiguousarray(g)
    (n, _, _, _), (kh, kw, c, _), (height, width) = g.shape, w.shape, input_size
    (top, _), (left, _) = padding
    dx = np.empty((n, height, width, c), np.float32)
    if force == "winograd_f4":
        _winograd_forward(g, w[::-1, ::-1].transpose(0, 1, 3, 2), None, None, dx, (height, width), (kh - 1 - top, kw - 1 - left))
        return dx
    if stride[0] > kh or stride[1] > kw:
        dx[...] = 0.0  # pixels that no window covers
    for y0 in range(min(stride[0], height)):
        for x0 in range(min(stride[1], width)):
            taps_y, taps_x = range((y0 + top) % stride[0], kh, stride[0]), range((x0 + left) % stride[1], kw, stride[1])
            if not taps_y or not taps_x:
                continue
            # Pixel y0 + i·s takes tap t from row i + (y0 + top - t) / s: the last tap from the first row.
            first_y, first_x = (taps_y[-1] - y0 - top) // stride[0], (taps_x[-1] - x0 - left) // stride[1]
            flipped = w[taps_y[0] :: stride[0], taps_x[0] :: stride[1]][::-1, ::-1].transpose(0, 1, 3, 2)
            size = -(-(height - y0) // stride[0]), -(-(width - x0) // stride[1])
            place = ((y0 * width + x0) * c, height * width * c, stride[0] * width * c, stride[1] * c)
            _forward(g, flipped, None, None, dx, size, (1, 1), (first_y, first_x), place)
    return dx


def conv2d_weight_grad(x: np.ndarray, g: np.ndarray, *, kernel_size: Pair, stride: Pair, padding: Padding, force: str | None = None) -> Any:
    """x (N, H, W, C) with g (N, Ho, Wo, O) give (*kernel_size, C, O)."""
    if not _ready(x, g):
        return NotImplemented
    x, g = np.ascontiguousarray(x), np.ascontiguousarray(g)
    (n, height, width, c), (_, ho, wo, o), (kh, kw) = x.shape, g.shape, kernel_size
    (top, _), (left, _) = padding
    dw = np.empty((kh, kw, c, o), np.float32)
    if force == "winograd_f4":
        _winograd_weight_grad(x, g, (top, left), dw)
        return dw
    gathered = kw * c < 16 and kh > 1
    band = _band(n, ho, stride[0] * ((wo - 1) * stride[1] + kw) * c)
    threads = _threads(n * -(-ho // band), n * ho * wo * kh * kw * c * o)
    padded, taps = -(-o // WIDTH) * WIDTH, kh * kw * c
    _keep, work = scratch(
        threads * (taps + kh * direct.COLUMNS) * padded,
        threads * (((band - 1) * stride[0] + kh) * ((wo - 1) * stride[1] + kw) * c + direct.COLUMNS),
        threads * (band * wo * taps + direct.COLUMNS) if gathered else 0,
        threads * band * wo * padded if o % WIDTH else 0,
    )
    launch(
        direct.weight_grad, threads, address(x), address(g), *work,
        n, height, width, c, kh, kw, *stride, top, left, ho, wo, o, band, gathered, threads,
    )  # fmt: skip
    segments, length = (1, taps) if gathered else (kh, kw * c)
    direct.reduce_sums(work[0], threads, segments, length, -(-length // direct.COLUMNS) * direct.COLUMNS, o, address(dw))
    return dw
