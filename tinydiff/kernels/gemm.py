"""Matrix products: a product of rows is a 1×1 convolution, and Aᵀ·B over many rows is its weight gradient, so `direct` runs both.

Packing B reads either layout of it, so g·wᵀ needs no transposed copy; xᵀ·g sums over the rows, each thread a part, and the parts
are added in order. Bound by FMA; by packing and by the call itself when A has few rows, and those products are left to BLAS.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tinydiff.kernels import record
from tinydiff.kernels.conv import direct_forward, direct_weight_grad, float32
from tinydiff.kernels.memory import contiguous, empty
from tinydiff.kernels.reduce import BLOCK, sum_axes


def pays(m: int, k: int, n: int, *, summed: bool) -> bool:
    """Whether an (M, K) by (K, N) product is at least as fast here as in BLAS; `summed`: as Aᵀ·B, summed over K rows of both.

    One thread each, interleaved: 0.98 to 1.1 times OpenBLAS's speed from 512 rows on, 1.0 to 1.2 summed over 3,136 rows or more;
    0.1 to 0.9 with 64 rows and less, 0.7 for 512 × 512 results summed over 512 rows.
    """
    if m * k * n < 1 << 19:
        return False
    return k >= 1024 and m * n <= 1 << 16 if summed else m >= 256


def _rows(a: np.ndarray, b: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    m, n = len(a), b.shape[1]
    y = empty(m, n)
    direct_forward(a[None, :, None], b[None, None], bias, None, y, (m, 1), (1, 1), (0, 0), (0, m * n, n, n))
    return y


def matmul(a: np.ndarray, b: np.ndarray) -> Any:
    """a (…, M, K) with b (K, N): (…, M, N). Transposed views need no copy; batches of both are left to BLAS."""
    if not float32(a, b) or a.ndim < 2 or b.ndim != 2:
        return NotImplemented
    if a.ndim == 2 and a.flags.f_contiguous and not a.flags.c_contiguous:
        if not pays(a.shape[0], a.shape[1], b.shape[1], summed=True):
            return NotImplemented
        product = np.empty((1, 1, a.shape[0], b.shape[1]), np.float32)
        columns, rows = a.T[None, :, None], contiguous(b)[None, :, None]
        direct_weight_grad(columns, rows, product, (1, 1), (0, 0))
        return product[0, 0]
    if not pays(a.size // a.shape[-1], b.shape[0], b.shape[1], summed=False):
        return NotImplemented
    rows = contiguous(a).reshape(-1, a.shape[-1])
    return _rows(rows, b).reshape(*a.shape[:-1], b.shape[1])


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a (M, K) with b (K, N), by whichever is faster."""
    found = matmul(a, b)
    return a @ b if found is NotImplemented else found


def linear(x: np.ndarray, w: np.ndarray, bias: np.ndarray | None) -> Any:
    """x (…, K) with w (K, N), plus bias (N,): (…, N), in one call and, for many rows or when recorded, one pass."""
    if not float32(x, w, bias) or x.ndim < 2:
        return NotImplemented
    rows = contiguous(x).reshape(-1, x.shape[-1])
    if pays(len(rows), *w.shape, summed=False) or record.active():
        y = _rows(rows, w, None if bias is None else contiguous(bias))
    else:
        y = rows @ w
        if bias is not None:
            y += bias
    return y.reshape(*x.shape[:-1], w.shape[1])


def linear_backward(g: np.ndarray, x: np.ndarray, w: np.ndarray, bias: np.ndarray | None, needs: list[bool]) -> Any:
    """The gradients of x, w and bias from g (…, N), each None where it isn't needed."""
    if not float32(g):
        return NotImplemented
    g_rows = contiguous(g).reshape(-1, w.shape[1])
    gx = _product(g_rows, w.T).reshape(x.shape) if needs[0] else None
    gw = _product(contiguous(x).reshape(-1, w.shape[0]).T, g_rows) if needs[1] else None
    gb = None
    if bias is not None and needs[2]:
        gb = sum_axes(g_rows, (0,)) if g_rows.size >= BLOCK * BLOCK else NotImplemented
        if gb is NotImplemented:
            gb = g_rows.sum(0)
    return gx, gw, gb
