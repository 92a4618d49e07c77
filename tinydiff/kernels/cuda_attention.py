"""Attention as the CUDA kernels of csrc/attention.cu, which never store the L×S matrix, forward or backward.

The kernels' arrays are (N, length, heads, size): those of the op with the middle axes exchanged, as linear layers write them,
so that a model's queries, keys and values are read where they lie, and its results need no copy to be joined.
"""

from __future__ import annotations

from typing import Any

from tinydiff.backend import Array, array_module
from tinydiff.kernels import cuda

LARGEST = {"float32": 128, "float64": 64}  # size of a head
LARGEST_BEFORE_SM80 = {"float32": 64, "float64": 0}  # with 64 KB of shared memory for a block


def _exchange(a: Array) -> Array:
    """(N, heads, length, size) to (N, length, heads, size), or back: a view."""
    return a.transpose(0, 2, 1, 3)


def _fits(q: Array, k: Array, v: Array, mask: Array | None) -> bool:
    """Whether shapes agree (where not, the composition says how) and heads are small enough."""
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4 or q.shape[:2] != k.shape[:2] or k.shape[:3] != v.shape[:3]:
        return False
    if q.shape[3] != k.shape[3] or (mask is not None and not _broadcasts(mask.shape, (*q.shape[:3], k.shape[2]))):
        return False
    (major, _), _ = cuda._gpu(array_module(q))
    largest = (LARGEST if major >= 8 else LARGEST_BEFORE_SM80).get(q.dtype.name, 0)
    return max(q.shape[3], v.shape[3]) <= largest


def _broadcasts(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """Whether an array of `shape` can be repeated to `target`."""
    return len(shape) <= len(target) and all(a in (1, b) for a, b in zip(reversed(shape), reversed(target)))


def _problem(q: Array, v: Array, mask: Array | None, is_causal: bool, scale: float | None) -> tuple[list[Any], Array | None]:
    """The launchers' numbers, from arrays (N, length, heads, size), and the mask in C order."""
    n, queries, heads, size = q.shape
    keys, value_size = v.shape[1], v.shape[3]
    strides = (0, 0, 0, 0)
    if mask is not None:
        xp = array_module(mask)
        mask = xp.ascontiguousarray(mask)
        strides = xp.broadcast_to(mask, (n, heads, queries, keys)).strides  # of bytes
    scale = size**-0.5 if scale is None else scale
    return [cuda.exactly(q), n, heads, queries, keys, size, value_size, int(is_causal), *strides, scale], mask


def attention(q: Array, k: Array, v: Array, mask: Array | None, *, is_causal: bool, scale: float | None) -> Any:
    """The result, and the logsumexp of each query's scores (N, heads, L). See `ops.scaled_dot_product_attention`."""
    if not _fits(q, k, v, mask):
        return NotImplemented
    given = cuda.taken(q=_exchange(q), k=_exchange(k), v=_exchange(v))
    if given is None:
        return NotImplemented
    q, k, v = given
    numbers, mask = _problem(q, v, mask, is_causal, scale)
    n, queries, heads, _ = q.shape
    arrays = {"q": q, "k": k, "v": v, "mask": mask, "out": cuda.empty_like(q, "out", n, queries, heads, v.shape[3])}
    arrays["logsumexp"] = cuda.empty_like(q, "logsumexp", n, heads, queries)
    cuda.launch("attention", numbers, arrays, ["out", "logsumexp"])
    return _exchange(arrays["out"]), arrays["logsumexp"]


def attention_backward(
    g: Array, q: Array, k: Array, v: Array, mask: Array | None, out: Array, logsumexp: Array, *, is_causal: bool, scale: float
) -> Any:
    """The gradients of q, k and v."""
    given = cuda.taken(g=_exchange(g), q=_exchange(q), k=_exchange(k), v=_exchange(v), out=_exchange(out))
    if given is None:
        return NotImplemented
    g, q, k, v, out = given
    numbers, mask = _problem(q, v, mask, is_causal, scale)
    gradients = {f"g{name}": cuda.empty_like(a, f"g{name}", *a.shape) for name, a in (("q", q), ("k", k), ("v", v))}
    arrays = {"g": g, "q": q, "k": k, "v": v, "mask": mask, "out": out, "logsumexp": logsumexp, **gradients}
    arrays["workspace"] = cuda.empty_like(q, "workspace", *logsumexp.shape)
    cuda.launch("attention_backward", numbers, arrays, [*gradients, "workspace"])
    return tuple(map(_exchange, gradients.values()))
