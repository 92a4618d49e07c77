"""Matrix products: A·B by rows is a 1×1 convolution, which `direct` runs; Aᵀ·B, summed over many rows, has a kernel here.

Packing B reads either layout of it, so g·wᵀ needs no transposed copy. Of Aᵀ·B each thread makes a share of the result's tiles,
from all rows, so that nothing is left to be added up, and the columns of B are summed by the way: the gradients of a linear
layer's weight and bias. Bound by FMA; by packing and by the call itself when A has few rows: those products are left to BLAS.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from tinydiff.kernels import record
from tinydiff.kernels.conv import PIXELS, SLAB, direct_forward, float32
from tinydiff.kernels.jit import njit
from tinydiff.kernels.launch import body, launch, unpack
from tinydiff.kernels.memory import address, contiguous, copy, empty, scratch, zero
from tinydiff.kernels.microkernel import COLUMNS, LANES, REST, VECTORS, WIDTH, accumulate, gemm_tile
from tinydiff.kernels.sums import sum_rows

_tile_columns = gemm_tile(COLUMNS, VECTORS, transposed=True)
_tile_rest = gemm_tile(REST, VECTORS, transposed=True)


def pays(m: int, k: int, n: int, *, summed: bool) -> bool:
    """Whether an (M, K) by (K, N) product is at least as fast here as in BLAS; `summed`: as Aᵀ·B, summed over K rows of both.

    One thread each, interleaved: 0.98 to 1.1 times OpenBLAS's speed from 512 rows on, 1.0 to 1.2 summed over as many while the
    result stays in L2; 0.1 to 0.9 with 64 rows and less.
    """
    if m * k * n < 1 << 19:
        return False
    return m % REST == 0 and k >= 256 and m * n <= 1 << 18 if summed else m >= 256


@njit
def multiply_summed(a, lda, b, ldb, c, ldc, rows, length, columns, first, last, add):  # type: ignore[no-untyped-def]
    """C (length, columns) = Aᵀ·B, or C += Aᵀ·B if `add`, for A (rows, length) and B (rows, columns) by rows.

    Of the strips of REST rows of C, panel by panel, only those from `first` to `last`. B is read in whole vectors.
    """
    strips = length // REST
    for j in range(first // strips, (last + strips - 1) // strips):
        row, end = REST * max(0, first - j * strips), REST * min(strips, last - j * strips)
        wanted, panel = min(WIDTH, columns - j * WIDTH), b + 4 * j * WIDTH
        while row < end:
            at = c + 4 * (row * ldc + j * WIDTH)
            here, start = a + 4 * row, at if add else 0
            if end - row >= COLUMNS:
                _tile_columns(here, lda, 0, 0, panel, ldb, 1, rows, 0, start, ldc, at, ldc, wanted)
                row += COLUMNS
            else:
                _tile_rest(here, lda, 0, 0, panel, ldb, 1, rows, 0, start, ldc, at, ldc, wanted)
                row += REST


@njit
def add_rows(x, stride, rows, columns, sums):  # type: ignore[no-untyped-def]
    """sums (columns) += Σ of the rows of x, `stride` apart."""
    for i in range(rows):
        for j in range(0, columns, LANES):
            accumulate(sums + 4 * j, x + 4 * (i * stride + j), min(LANES, columns - j))


@body
def _summed(args, thread):  # type: ignore[no-untyped-def]
    """The thread's share of c (length, columns) = aᵀ·b, and of the column sums of b, for a and b of `rows` rows."""
    a, b, c, sums, slabs, rows, length, columns, block, threads = unpack(args, 10)
    strips, ldb = length // REST, (columns + WIDTH - 1) // WIDTH * WIDTH
    total = strips * ldb // WIDTH
    first, last = total * thread // threads, total * (thread + 1) // threads
    # The column sums of a panel are made where its first strip is.
    left = min(columns, (first + strips - 1) // strips * WIDTH)
    right = min(columns, (last + strips - 1) // strips * WIDTH)
    slab = slabs + 4 * thread * block * ldb
    if sums:
        zero(sums + 4 * left, right - left)
    for row in range(0, rows, block):
        count, here = min(block, rows - row), b + 4 * row * columns
        if sums:
            add_rows(here + 4 * left, columns, count, right - left, sums + 4 * left)
        if columns != ldb:
            for i in range(count):
                copy(slab + 4 * i * ldb, here + 4 * i * columns, columns)
            here = slab
        multiply_summed(a + 4 * row * length, length, here, ldb, c, columns, count, length, columns, first, last, row > 0)


def block_rows(length: int) -> int:
    """Rows that Aᵀ·B sums over at a time: a panel of B stays in L1, all of A (rows, length) in L2."""
    return max(1, min(PIXELS, SLAB // length))


def _product_summed(a: np.ndarray, b: np.ndarray, sums: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """aᵀ·b of C-contiguous a (rows, M) and b (rows, N), M a multiple of REST; and if wanted the sums of b's columns."""
    (rows, length), columns = a.shape, b.shape[1]
    c, total = empty(length, columns), np.empty(columns, np.float32) if sums else None
    block, threads = block_rows(length), max(1, min(numba.get_num_threads(), length * columns // (REST * WIDTH)))
    padded = -(-columns // WIDTH) * WIDTH
    _keep, (slabs,) = scratch(threads * block * padded * (padded > columns))
    args = (address(a), address(b), address(c), address(total), slabs, rows, length, columns, block, threads)
    launch(_summed, threads, *args)
    return c, total


def _rows(a: np.ndarray, b: np.ndarray, bias: np.ndarray | None = None, residual: np.ndarray | None = None) -> np.ndarray:
    m, n = len(a), b.shape[1]
    y = empty(m, n)
    direct_forward(a[None, :, None], b[None, None], bias, residual, y, (m, 1), (1, 1), (0, 0), (0, m * n, n, n))
    return y


def matmul(a: np.ndarray, b: np.ndarray) -> Any:
    """a (…, M, K) with b (K, N): (…, M, N). Transposed views need no copy; batches of both are left to BLAS."""
    if not float32(a, b) or a.ndim < 2 or b.ndim != 2:
        return NotImplemented
    if a.ndim == 2 and a.flags.f_contiguous and not a.flags.c_contiguous:
        if not pays(a.shape[0], a.shape[1], b.shape[1], summed=True):
            return NotImplemented
        return _product_summed(a.T, contiguous(b), False)[0]
    if not pays(a.size // a.shape[-1], b.shape[0], b.shape[1], summed=False):
        return NotImplemented
    rows = contiguous(a).reshape(-1, a.shape[-1])
    return _rows(rows, b).reshape(*a.shape[:-1], b.shape[1])


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a (M, K) with b (K, N), by whichever is faster."""
    found = matmul(a, b)
    return a @ b if found is NotImplemented else found


def linear(x: np.ndarray, w: np.ndarray, bias: np.ndarray | None, residual: np.ndarray | None = None) -> Any:
    """x (…, K) with w (K, N), plus bias (N,) and residual (…, N): (…, N), in one pass, for many rows or when recorded."""
    if not float32(x, w, bias, residual) or x.ndim < 2 or not (pays(x.size // len(w), *w.shape, summed=False) or record.active()):
        return NotImplemented
    rows = contiguous(x).reshape(-1, x.shape[-1])
    bias, residual = (None if a is None else contiguous(a) for a in (bias, residual))
    return _rows(rows, w, bias, residual).reshape(*x.shape[:-1], w.shape[1])


def linear_backward(g: np.ndarray, x: np.ndarray, w: np.ndarray, bias: np.ndarray | None, needs: list[bool]) -> Any:
    """The gradients of x, w and bias from g (…, N), each None where it isn't needed."""
    if not float32(g):
        return NotImplemented
    g_rows, x_rows = contiguous(g).reshape(-1, w.shape[1]), contiguous(x).reshape(-1, w.shape[0])
    gx = _product(g_rows, w.T).reshape(x.shape) if needs[0] else None
    wants_bias = bias is not None and needs[2]
    if needs[1] and pays(w.shape[0], len(x_rows), w.shape[1], summed=True):
        return gx, *_product_summed(x_rows, g_rows, wants_bias)
    return gx, x_rows.T @ g_rows if needs[1] else None, sum_rows(g_rows[None])[0] if wants_bias else None
