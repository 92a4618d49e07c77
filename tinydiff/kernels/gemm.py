"""Matrix products: a product of rows is a 1×1 convolution, and Aᵀ·B over many rows is its weight gradient, so `direct` runs both.

Packing B reads either layout of it, so g·wᵀ needs no transposed copy; xᵀ·g sums over the rows, each thread a
part, and the parts are added in order. Bound by FMA; by packing when A has few rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tinydiff.kernels.conv import direct_forward, direct_weight_grad, float32


def _product(a: np.ndarray, b: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """a (N, M, K) with b (K, C) or (N, K, C)."""
    n, m, c = *a.shape[:2], b.shape[-1]
    y = np.empty((n, m, c), np.float32)
    direct_forward(a[:, :, None], b[..., None, None, :, :], bias, None, y, (m, 1), (1, 1), (0, 0), (0, m * c, c, c), "direct")
    return y


def matmul(a: np.ndarray, b: np.ndarray) -> Any:
    """a (M, K) or (…, M, K) with b (K, N), or both with the same batch axes; transposed views of a matrix need no copy."""
    if not float32(a, b) or a.ndim < 2 or b.ndim < 2:
        return NotImplemented
    if a.ndim == b.ndim == 2:
        if a.flags.f_contiguous and not a.flags.c_contiguous:
            dw = np.empty((1, 1, a.shape[0], b.shape[1]), np.float32)
            direct_weight_grad(a.T[None, :, None], np.ascontiguousarray(b)[None, :, None], dw, (1, 1), (0, 0), "direct")
            return dw[0, 0]
        return _product(np.ascontiguousarray(a)[None], b)[0]
    if b.ndim == 2:
        rows = np.ascontiguousarray(a).reshape(1, -1, a.shape[-1])
        return _product(rows, b).reshape(*a.shape[:-1], b.shape[1])
    if a.shape[:-2] != b.shape[:-2]:
        return NotImplemented
    if b.ndim > 3:
        b = b.reshape(-1, *b.shape[-2:])
    y = _product(np.ascontiguousarray(a).reshape(-1, *a.shape[-2:]), b)
    return y.reshape(*a.shape[:-1], b.shape[-1])


def linear(x: np.ndarray, w: np.ndarray, bias: np.ndarray | None = None) -> Any:
    """x (…, K) with w (K, N), plus bias (N,)."""
    if not float32(x, w, bias):
        return NotImplemented
    rows = np.ascontiguousarray(x).reshape(1, -1, x.shape[-1])
    return _product(rows, w, None if bias is None else np.ascontiguousarray(bias)).reshape(*x.shape[:-1], w.shape[1])
