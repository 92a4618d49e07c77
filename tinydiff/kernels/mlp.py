"""Two linear layers with an activation between, forward and backward, a band of rows at a time.

The inner layer is some four times as wide as what goes in and out, and as products and activations of their own read and wrote it
seven times over. Here a band of it stays in L2 from the product that makes it to the last that reads it; what the activation was
given is written once, for the backward. Bound by FMA.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from tinydiff.kernels import mathfun
from tinydiff.kernels.activation import QUICK_GELU
from tinydiff.kernels.arrays import load, plain, store, threads_for
from tinydiff.kernels.direct import pack, tile_rows
from tinydiff.kernels.gemm import add_rows, block_rows, multiply_summed
from tinydiff.kernels.jit import njit
from tinydiff.kernels.launch import body, launch, unpack
from tinydiff.kernels.mathfun import bounded, one_and_exp_of_minus
from tinydiff.kernels.memory import address, contiguous, empty, lasting, scratch, will_write, zero
from tinydiff.kernels.microkernel import LINE, REST, ROWS, WIDTH

KINDS = {"quick_gelu": 0, "gelu": 1, "geglu": 2}
LARGE = 1 << 19  # floats of both weights together: beyond, they would not stay in L2 beside a band
LEAST = 256  # rows from which all this pays
_f = np.float32
_a = _f(QUICK_GELU[0])


@njit
def multiply(a, lda, packed, bias, initial, c, ldc, rows, length, columns):  # type: ignore[no-untyped-def]
    """C (rows, columns) = A·B + bias + initial, from packed panels of B (length, columns); bias or initial 0 means none."""
    for j in range(0, columns, WIDTH):
        b, add = packed + 4 * j * length, bias + 4 * j if bias else 0
        done = 0
        while done < rows:
            at = 4 * (done * ldc + j)
            start, here = initial + at if initial else 0, a + 4 * done * lda
            wanted, left = min(WIDTH, columns - j), rows - done
            for row in range(ROWS, 2 * ROWS):  # the next tile's
                for k in range(0, WIDTH, LINE // 4):
                    will_write(c + at, row * ldc + k)
            done += tile_rows(here, lda, 0, b, WIDTH, 1, length, add, start, ldc, c + at, ldc, wanted, left)


@njit
def _activate(z, h, rows, inner, kind):  # type: ignore[no-untyped-def]
    """h (rows, inner) from z (rows, inner), or (rows, 2 inner) where it is gated."""
    if kind == 0:
        for i in range(rows * inner):
            store(h, i, load(z, i) / one_and_exp_of_minus(bounded(_a * load(z, i))))
    elif kind == 1:
        for i in range(rows * inner):
            store(h, i, mathfun.gelu(load(z, i)))
    else:
        for row in range(rows):
            value, gate, y = 2 * row * inner, (2 * row + 1) * inner, row * inner
            for i in range(inner):
                store(h, y + i, load(z, value + i) * mathfun.gelu(load(z, gate + i)))


@njit
def _activate_again(z, g, h, gz, rows, inner, kind):  # type: ignore[no-untyped-def]
    """h as above, and from its gradient g that of z."""
    if kind == 0:
        for i in range(rows * inner):
            x = bounded(_a * load(z, i))
            s = _f(1) / one_and_exp_of_minus(x)
            store(h, i, load(z, i) * s)
            store(gz, i, load(g, i) * s * (_f(1) + x * (_f(1) - s)))
    elif kind == 1:
        for i in range(rows * inner):
            store(h, i, mathfun.gelu(load(z, i)))
            store(gz, i, load(g, i) * mathfun.gelu_slope(load(z, i)))
    else:
        for row in range(rows):
            value, gate, y = 2 * row * inner, (2 * row + 1) * inner, row * inner
            for i in range(inner):
                opened = mathfun.gelu(load(z, gate + i))
                store(h, y + i, load(z, value + i) * opened)
                store(gz, value + i, load(g, y + i) * opened)
                store(gz, gate + i, load(g, y + i) * load(z, value + i) * mathfun.gelu_slope(load(z, gate + i)))


@body
def _forward(args, thread):  # type: ignore[no-untyped-def]
    """z = x·w1 + b1 and y = h·w2 + b2 + residual, with h a band of activated z."""
    x, w1, b1, z, w2, b2, residual, y, work, rows, c, wide, inner, o, kind, band, threads = unpack(args, 17)
    h = work + 4 * thread * band * inner
    bands = (rows + band - 1) // band
    for item in range(thread * bands // threads, (thread + 1) * bands // threads):
        first = item * band
        count, there, start = min(band, rows - first), z + 4 * first * wide, residual + 4 * first * o if residual else 0
        multiply(x + 4 * first * c, c, w1, b1, 0, there, wide, count, c, wide)
        _activate(there, h, count, inner, kind)
        multiply(h, inner, w2, b2, start, y + 4 * first * o, o, count, inner, o)


@body
def _backward(args, thread):  # type: ignore[no-untyped-def]
    """gx, and in the thread's `sums` the gradients of w1, w2, b1 and b2, one behind the other, summed over its bands."""
    g, x, z, w1, w2, gx, sums, work, rows, c, wide, inner, o, kind, band, threads = unpack(args, 16)
    gh = work + 4 * thread * band * (2 * inner + wide)
    h, gz = gh + 4 * band * inner, gh + 8 * band * inner
    gw1 = sums + 4 * thread * (c * wide + inner * o + wide + o)
    gw2 = gw1 + 4 * c * wide
    gb1 = gw2 + 4 * inner * o
    zero(gb1, wide + o)
    bands = (rows + band - 1) // band
    start = thread * bands // threads
    for item in range(start, (thread + 1) * bands // threads):
        first = item * band
        count, there, here, more = min(band, rows - first), g + 4 * first * o, x + 4 * first * c, item > start
        multiply(there, o, w2, 0, 0, gh, inner, count, o, inner)
        _activate_again(z + 4 * first * wide, gh, h, gz, count, inner, kind)
        multiply_summed(h, inner, there, o, gw2, o, count, inner, o, 0, inner // REST * (o // WIDTH), more)
        multiply_summed(here, c, gz, wide, gw1, wide, count, c, wide, 0, c // REST * (wide // WIDTH), more)
        multiply(gz, wide, w1, 0, 0, gx + 4 * first * c, c, count, wide, c)
        add_rows(gz, wide, count, wide, gb1)
        add_rows(there, o, count, o, gb1 + 4 * wide)


def _pack(w: np.ndarray, packed: int, kept: bool = False) -> None:
    """w (K, N), of any strides, as panels."""
    k, n = w.shape
    threads = min(threads_for(w.size), -(-n // WIDTH))
    launch(pack, threads, address(w), 0, 0, *(s // 4 for s in w.strides), 1, 1, k, n, packed, threads, recorded=not kept)


def _bands(rows: int, inner: int) -> tuple[int, int]:
    """Threads, and rows at a time: as many for every thread."""
    threads = max(1, min(numba.get_num_threads(), rows // 32))
    share = -(-rows // threads)
    bands = -(-share // block_rows(inner))
    return threads, -(-share // bands)


def mlp(
    x: np.ndarray,
    w1: np.ndarray,
    b1: np.ndarray,
    w2: np.ndarray,
    b2: np.ndarray,
    residual: np.ndarray | None,
    *,
    activation: str,
) -> Any:
    """(y, z): z (rows, wide) = x w1 + b1 and y (…, O) = act(z) w2 + b2 + residual, for x (…, C).

    NotImplemented for few rows, large weights, and sizes that tiles don't divide.
    """
    kind = KINDS.get(activation)
    given = [x, w1, b1, w2, b2] if residual is None else [x, w1, b1, w2, b2, residual]
    if kind is None or not plain(*given) or x.ndim < 2 or w1.ndim != 2 or w2.ndim != 2:
        return NotImplemented
    (c, wide), (inner, o), rows = w1.shape, w2.shape, x.size // x.shape[-1]
    shape = (*x.shape[:-1], o)
    fits = x.shape[-1] == c and wide == (2 * inner if kind == 2 else inner) and b1.shape == (wide,) and b2.shape == (o,)
    if not fits or (residual is not None and residual.shape != shape):
        return NotImplemented
    if rows < LEAST or w1.size + w2.size > LARGE or c % REST or inner % REST or wide % WIDTH or o % WIDTH:
        return NotImplemented
    threads, band = _bands(rows, inner)
    z, y = empty(rows, wide), empty(*shape)
    kept = [lasting(w, w.size) for w in (w1, w2)]
    _keep, (p1, p2, work) = scratch(*(0 if k else w.size for k, w in zip(kept, (w1, w2))), threads * band * inner)
    p1, p2 = kept[0] or p1, kept[1] or p2
    _pack(w1, p1, bool(kept[0]))
    _pack(w2, p2, bool(kept[1]))
    places = (address(x), p1, address(b1), address(z), p2, address(b2), address(residual), address(y))
    launch(_forward, threads, *places, work, rows, c, wide, inner, o, kind, band, threads)
    return y, z


def mlp_backward(g: np.ndarray, x: np.ndarray, w1: np.ndarray, w2: np.ndarray, z: np.ndarray, *, activation: str) -> Any:
    """The gradients of x, w1, b1, w2 and b2 from g, that of y; z as from the forward."""
    if not plain(g := contiguous(g)):
        return NotImplemented
    (c, wide), (inner, o), rows = w1.shape, w2.shape, len(z)
    threads, band = _bands(rows, inner)
    sizes = [c * wide, inner * o, wide, o]
    gx, sums = empty(*x.shape), empty(threads, sum(sizes))
    _keep, (p1, p2, work) = scratch(
        -(-c // WIDTH) * WIDTH * wide, -(-inner // WIDTH) * WIDTH * o, threads * band * (2 * inner + wide)
    )
    _pack(w1.T, p1)
    _pack(w2.T, p2)
    places = (address(g), address(x), address(z), p1, p2, address(gx), address(sums))
    launch(_backward, threads, *places, work, rows, c, wide, inner, o, KINDS[activation], band, threads)
    total = sums[0] if threads == 1 else sums.sum(0)
    gw1, gw2, gb1, gb2 = np.split(total, np.cumsum(sizes)[:-1])
    return gx, gw1.reshape(c, wide), gb1, gw2.reshape(inner, o), gb2
