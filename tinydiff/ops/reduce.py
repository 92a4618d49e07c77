"""Reductions over any axes, with `keepdims`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tinydiff import kernels
from tinydiff.backend import Array
from tinydiff.op import LARGE, fused, op
from tinydiff.ops.elementwise import exp, mul, sqrt, sub
from tinydiff.ops.shape import SUMMED, broadcast_to, flip, reshape
from tinydiff.tensor import Tensor

Axes = int | Sequence[int] | None


def normalise_axes(axis: Axes, ndim: int) -> tuple[int, ...]:
    """Axes as sorted non-negative numbers, all for None. Raises IndexError for one that isn't there, ValueError for a double."""
    if axis is None:
        return tuple(range(ndim))
    axes = (axis,) if isinstance(axis, int | np.integer) else tuple(axis)
    for a in axes:
        if not -ndim <= a < ndim:
            raise IndexError(f"axis {a} is out of range for a tensor of {ndim} axes; use {-ndim} to {ndim - 1}")
    found = tuple(sorted(a % ndim for a in axes))
    if len(set(found)) != len(found):
        raise ValueError(f"axis {axis} names one axis twice")
    return found


def _restore(x: Tensor, shape: tuple[int, ...], axis: Axes, keepdims: bool) -> Tensor:
    """A reduced tensor with its reduced axes back, of size 1."""
    if keepdims:
        return x
    axes = normalise_axes(axis, len(shape))
    return reshape(x, tuple(1 if i in axes else n for i, n in enumerate(shape)))


def _tuple(axis: Axes) -> Any:
    return tuple(axis) if isinstance(axis, list) else axis


@op(dtypes="any")
def sum(xp: Any, x: Array, axis: Axes = None, keepdims: bool = False) -> Array:
    """The sum over `axis` (all axes by default). Booleans and small integers are summed as int64."""
    normalise_axes(axis, x.ndim)
    return xp.sum(x, axis=_tuple(axis), keepdims=keepdims)


@sum.vjp
def _(g: Tensor, shapes: Any, axis: Axes, keepdims: bool) -> Tensor:
    return broadcast_to(_restore(g, shapes[0], axis, keepdims), shapes[0])


@sum.kernel("numpy", above=SUMMED)
def _(x: Array, axis: Axes, keepdims: bool) -> Any:
    axes = normalise_axes(axis, x.ndim)
    total = kernels.sums.sum_axes(x, axes)
    if total is NotImplemented or not keepdims:
        return total
    return total.reshape([1 if i in axes else n for i, n in enumerate(x.shape)])


@sum.kernel("cuda", above=LARGE)
def _(x: Array, axis: Axes, keepdims: bool) -> Any:
    axes = normalise_axes(axis, x.ndim)
    total = kernels.gpu.sum_rows(x, axes)
    return total if total is NotImplemented or not keepdims else total.reshape((1,) * len(axes) + total.shape)


@fused(dtypes="float")
def mean(x: Tensor, axis: Axes = None, keepdims: bool = False) -> Tensor:
    """The mean over `axis`. Raises ValueError when there is nothing to average."""
    count = math.prod(x.shape[a] for a in normalise_axes(axis, x.ndim))
    if count == 0:
        raise ValueError(f"mean over no elements (shape {x.shape}, axis {axis})")
    return mul(sum(x, axis, keepdims), 1.0 / count)


@fused
def var(x: Tensor, axis: Axes = None, correction: int = 0, keepdims: bool = False) -> Tensor:
    """The variance over `axis`: squared deviations divided by (count - correction). Raises ValueError if that is not positive."""
    count = math.prod(x.shape[a] for a in normalise_axes(axis, x.ndim))
    if count <= correction:
        raise ValueError(f"var of {count} elements with correction={correction} (shape {x.shape}, axis {axis}) is not defined")
    deviation = sub(x, mean(x, axis, keepdims=True))
    return mul(sum(mul(deviation, deviation), axis, keepdims), 1.0 / (count - correction))


@fused
def std(x: Tensor, axis: Axes = None, correction: int = 0, keepdims: bool = False) -> Tensor:
    """The square root of `var`."""
    return sqrt(var(x, axis, correction, keepdims))


@op(dtypes="any")
def max(xp: Any, x: Array, axis: Axes = None, keepdims: bool = False) -> Array:
    """The largest value over `axis`; equal ones share the gradient."""
    normalise_axes(axis, x.ndim)
    return xp.max(x, axis=_tuple(axis), keepdims=keepdims)


@op(dtypes="any")
def min(xp: Any, x: Array, axis: Axes = None, keepdims: bool = False) -> Array:
    """The smallest value over `axis`; equal ones share the gradient."""
    normalise_axes(axis, x.ndim)
    return xp.min(x, axis=_tuple(axis), keepdims=keepdims)


@max.vjp
def _(g: Tensor, x: Tensor, out: Tensor, axis: Axes, keepdims: bool) -> Tensor:
    return _to_extremes(g, x, out, axis, keepdims)


@min.vjp
def _(g: Tensor, x: Tensor, out: Tensor, axis: Axes, keepdims: bool) -> Tensor:
    return _to_extremes(g, x, out, axis, keepdims)


def _to_extremes(g: Tensor, x: Tensor, out: Tensor, axis: Axes, keepdims: bool) -> Tensor:
    extreme = x.data == _restore(out.detach(), x.shape, axis, keepdims).data
    share = extreme / extreme.sum(axis=normalise_axes(axis, x.ndim), keepdims=True)
    return mul(_restore(g, x.shape, axis, keepdims), Tensor(share.astype(g.dtype)))


@op(dtypes="any")
def argmax(xp: Any, x: Array, axis: int | None = None, keepdims: bool = False) -> Array:
    """The index (int64) of the first largest value over `axis`, or in the flattened tensor. Not differentiable."""
    return xp.argmax(x, axis=axis, keepdims=keepdims)


@op(dtypes="any")
def argmin(xp: Any, x: Array, axis: int | None = None, keepdims: bool = False) -> Array:
    """The index (int64) of the first smallest value over `axis`, or in the flattened tensor. Not differentiable."""
    return xp.argmin(x, axis=axis, keepdims=keepdims)


@op
def logsumexp(xp: Any, x: Array, axis: Axes = None, keepdims: bool = False) -> Array:
    """log Σ exp(x) over `axis`, shifted by the maximum so that nothing overflows."""
    axes = normalise_axes(axis, x.ndim)
    top = xp.max(x, axis=axes, keepdims=True)
    top = xp.where(xp.isfinite(top), top, xp.zeros((), x.dtype))
    with np.errstate(divide="ignore"):
        total = xp.log(xp.sum(xp.exp(x - top), axis=axes, keepdims=True)) + top
    return total if keepdims else total.reshape([n for i, n in enumerate(x.shape) if i not in axes])


@logsumexp.vjp
def _(g: Tensor, x: Tensor, out: Tensor, axis: Axes, keepdims: bool) -> Tensor:
    return mul(_restore(g, x.shape, axis, keepdims), exp(sub(x, _restore(out, x.shape, axis, keepdims))))


@op
def softmax(xp: Any, x: Array, axis: int = -1) -> Array:
    """exp(x) / Σ exp(x) over `axis`."""
    normalise_axes(axis, x.ndim)
    powers = xp.exp(x - xp.max(x, axis=axis, keepdims=True)) if x.size else x
    return powers / xp.sum(powers, axis=axis, keepdims=True)


@softmax.vjp
def _(g: Tensor, out: Tensor, axis: int) -> Tensor:
    scaled = mul(g, out)
    return sub(scaled, mul(out, sum(scaled, axis, keepdims=True)))


@softmax.kernel("numpy", above=256)
def _(x: Array, axis: int) -> Any:
    return kernels.softmax.softmax(x) if axis in (-1, x.ndim - 1) else NotImplemented


@softmax.kernel_backward("numpy")
def _(g: Array, out: Array, axis: int) -> Any:
    return kernels.softmax.softmax_backward(g, out) if axis in (-1, out.ndim - 1) else NotImplemented


@softmax.kernel("cuda")
def _(x: Array, axis: int) -> Any:
    return kernels.cuda_norm.softmax(x, axis=axis)


@softmax.kernel_backward("cuda")
def _(g: Array, out: Array, axis: int) -> Any:
    return kernels.cuda_norm.softmax_backward(g, out, axis=axis)


@op
def log_softmax(xp: Any, x: Array, axis: int = -1) -> Array:
    """log softmax(x) over `axis`, without overflow."""
    normalise_axes(axis, x.ndim)
    shifted = x - xp.max(x, axis=axis, keepdims=True) if x.size else x
    return shifted - xp.log(xp.sum(xp.exp(shifted), axis=axis, keepdims=True))


@log_softmax.vjp
def _(g: Tensor, out: Tensor, axis: int) -> Tensor:
    return sub(g, mul(exp(out), sum(g, axis, keepdims=True)))


@log_softmax.kernel("numpy", above=256)
def _(x: Array, axis: int) -> Any:
    return kernels.softmax.log_softmax(x) if axis in (-1, x.ndim - 1) else NotImplemented


@log_softmax.kernel_backward("numpy")
def _(g: Array, out: Array, axis: int) -> Any:
    return kernels.softmax.log_softmax_backward(g, out) if axis in (-1, out.ndim - 1) else NotImplemented


@log_softmax.kernel("cuda")
def _(x: Array, axis: int) -> Any:
    return kernels.cuda_norm.softmax(x, axis=axis, logarithmic=True)


@log_softmax.kernel_backward("cuda")
def _(g: Array, out: Array, axis: int) -> Any:
    return kernels.cuda_norm.softmax_backward(g, out, axis=axis, logarithmic=True)


@op(dtypes="any")
def cumsum(xp: Any, x: Array, axis: int = -1) -> Array:
    """Running sums along `axis`."""
    normalise_axes(axis, x.ndim)
    return xp.cumsum(x, axis=axis)


@cumsum.vjp
def _(g: Tensor, axis: int) -> Tensor:
    return flip(cumsum(flip(g, axis), axis), axis)
