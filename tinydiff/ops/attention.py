"""Scaled-dot-product attention."""

from __future__ import annotations

import math
from typing import Any

from tinydiff import kernels
from tinydiff.backend import Array, array_module
from tinydiff.op import fused
from tinydiff.ops.elementwise import astype, mul, where
from tinydiff.ops.linalg import matmul
from tinydiff.ops.reduce import softmax
from tinydiff.ops.shape import permute, reshape, transpose
from tinydiff.tensor import Tensor, beside

MASKED = -1e30  # far below any score, yet finite: rows with nothing to attend stay free of NaN


def _mask(mask: Any, is_causal: bool, scores: tuple[int, ...], like: Array) -> Array | None:
    """The boolean mask that holds (True: may attend), beside `like`, or None."""
    if mask is not None:
        mask = beside(mask, like)
        if mask.dtype != bool:
            raise TypeError(f"scaled_dot_product_attention: mask must be boolean (True: may attend), not {mask.dtype}")
    if is_causal:
        causal = array_module(like).tri(scores[-2], scores[-1], dtype=bool)
        mask = causal if mask is None else mask & causal
    return mask


def _flops(out: Array, q: Array, k: Array, *rest: Any, **params: Any) -> float:
    return 4 * out.size * k.shape[-2]


@fused(flops=_flops)
def scaled_dot_product_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any = None,
    is_causal: bool = False,
    scale: float | None = None,
    heads: int | None = None,
) -> Tensor:
    """softmax(q kᵀ · scale) v, per head (Vaswani et al. 2017).

    Args:
        q: (N, heads, L, size). k: (N, heads, S, size). v: (N, heads, S, value size).
        mask: boolean, broadcastable to (N, heads, L, S); True where a query may attend. A row without any gives zeros.
        is_causal: query i attends only to keys 0 … i. scale: by default size^-½.
        heads: if given, q, k, v and the result are (N, length, heads · size), as linear layers make and take them.

    The kernels never store the L×S matrix; the composition that other devices and second derivatives run does.
    Raises ValueError when shapes disagree, TypeError for a mask of numbers.
    """
    if heads is not None:
        if any(x.ndim != 3 or heads < 1 or x.shape[2] % heads for x in (q, k, v)):
            raise ValueError(
                f"attention with {heads} heads needs q, k, v (N, length, a multiple of that), not {q.shape}, {k.shape}, {v.shape}"
            )
        sides = [permute(reshape(x, (*x.shape[:2], heads, x.shape[2] // heads)), (0, 2, 1, 3)) for x in (q, k, v)]
        joined = permute(scaled_dot_product_attention(*sides, mask, is_causal, scale), (0, 2, 1, 3))
        return reshape(joined, (*q.shape[:2], v.shape[2]))
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4 or q.shape[-1] != k.shape[-1] or k.shape[-2] != v.shape[-2]:
        raise ValueError(
            f"attention needs q (N, heads, L, D), k (N, heads, S, D), v (N, heads, S, E), not {q.shape}, {k.shape}, {v.shape}"
        )
    scores = mul(matmul(q, transpose(k, -1, -2)), q.shape[-1] ** -0.5 if scale is None else scale)
    allowed = _mask(mask, is_causal, scores.shape, scores.data)
    if allowed is None:
        return matmul(softmax(scores, -1), v)
    weights = mul(softmax(where(allowed, scores, MASKED), -1), astype(Tensor(allowed), scores.dtype))
    return matmul(weights, v)


def _split(x: Array, heads: int | None) -> Array:
    """(N, length, heads · size) seen as (N, heads, length, size); x itself without `heads`, or where it can't be split."""
    if heads is None or x.ndim != 3 or heads < 1 or x.shape[2] % heads:
        return x
    return x.reshape(*x.shape[:2], heads, x.shape[2] // heads).transpose(0, 2, 1, 3)


def _join(x: Array, heads: int | None) -> Array:
    """The reverse."""
    return x if heads is None else x.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1)


@scaled_dot_product_attention.kernel("numpy")
def _(q: Array, k: Array, v: Array, mask: Any, is_causal: bool, scale: float | None, heads: int | None) -> Any:
    q, k, v = _split(q, heads), _split(k, heads), _split(v, heads)
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4 or q.size * k.shape[2] < 1 << 12:
        return NotImplemented
    if q.shape[:2] != k.shape[:2] or q.shape[:2] != v.shape[:2] or q.shape[3] != k.shape[3] or k.shape[2] != v.shape[2]:
        return NotImplemented
    mask = _mask(mask, False, (q.shape[2], k.shape[2]), q)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    found = kernels.attention.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale)
    return found if found is NotImplemented else (_join(found[0], heads), found)


@scaled_dot_product_attention.kernel_backward("numpy")
def _(
    g: Array, q: Array, k: Array, v: Array, cache: Any, mask: Any, is_causal: bool, scale: float | None, heads: int | None
) -> Any:
    out, logsumexp = cache
    g, q, k, v = _split(g, heads), _split(q, heads), _split(k, heads), _split(v, heads)
    mask = _mask(mask, False, (q.shape[2], k.shape[2]), q)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    found = kernels.attention.scaled_dot_product_attention_backward(
        g, q, k, v, mask, out, logsumexp, is_causal=is_causal, scale=scale
    )
    return found if found is NotImplemented else tuple(_join(a, heads) for a in found)


@scaled_dot_product_attention.kernel("cuda")
def _(q: Array, k: Array, v: Array, mask: Any, is_causal: bool, scale: float | None, heads: int | None) -> Any:
    q, k, v = _split(q, heads), _split(k, heads), _split(v, heads)
    found = kernels.cuda_attention.attention(q, k, v, _mask(mask, False, (), q), is_causal=is_causal, scale=scale)
    return found if found is NotImplemented else (_join(found[0], heads), found)


@scaled_dot_product_attention.kernel_backward("cuda")
def _(
    g: Array, q: Array, k: Array, v: Array, cache: Any, mask: Any, is_causal: bool, scale: float | None, heads: int | None
) -> Any:
    g, q, k, v = _split(g, heads), _split(q, heads), _split(k, heads), _split(v, heads)
    mask = _mask(mask, False, (), q)
    found = kernels.cuda_attention.attention_backward(g, q, k, v, mask, *cache, is_causal=is_causal, scale=scale)
    return found if found is NotImplemented else tuple(_join(a, heads) for a in found)
