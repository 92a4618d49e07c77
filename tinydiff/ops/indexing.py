"""Gathering and scattering by integer tensors, and nearest-neighbour upsampling."""

from __future__ import annotations

from typing import Any

import numpy as np

from tinydiff import kernels
from tinydiff.backend import Array, array_module, device_of
from tinydiff.op import LARGE, op
from tinydiff.ops.reduce import sum
from tinydiff.ops.shape import check_axis, no_flops, reshape
from tinydiff.tensor import Tensor, as_tensor, beside


def checked_indices(
    name: str, indices: Any, x: Tensor, limit: int, wrap: bool = True, what: tuple[str, str] = ("index", "entries")
) -> Array:
    """Integer indices as an array beside x's, negative ones counted from the end if `wrap`. Raises TypeError and IndexError.

    On the host they are checked before they move; checking what is on a GPU already costs a wait for it.
    """
    array = indices.data if isinstance(indices, Tensor) else indices
    if device_of(array) is None:
        array = np.asarray(array)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name}: indices must be integers, not {array.dtype}")
    wrong = (array < (-limit if wrap else 0)) | (array >= limit)
    if wrong.any():
        raise IndexError(f"{name}: {what[0]} {array[wrong][0].item()} is out of range for {limit} {what[1]}")
    if wrap and array.dtype.kind == "i":
        array = array.astype(np.int64, copy=False)
        array = array_module(array).where(array < 0, array + limit, array)
    return beside(Tensor(array) if isinstance(indices, Tensor) else array, x.data)


@op(dtypes="any", name="take", flops=no_flops)
def _take(xp: Any, x: Array, indices: Any, axis: int = 0) -> Array:
    return xp.take(x, indices, axis=axis)


@_take.vjp
def _(g: Tensor, shapes: Any, indices: Any, axis: int) -> Tensor:
    return _untake(g, shapes[0], indices, axis)


@op(dtypes="any", name="untake")
def _untake(xp: Any, x: Array, shape: tuple[int, ...], indices: Any, axis: int = 0) -> Array:
    """Zeros of `shape` with slices of `x` added at `indices` along `axis`: the transpose of `take`."""
    result = xp.zeros(shape, x.dtype)
    where = (slice(None),) * axis + (indices,)
    xp.add.at(result, where, x)
    return result


@_untake.vjp
def _(g: Tensor, indices: Any, axis: int) -> Tensor:
    return _take(g, indices, axis)


@_untake.kernel("numpy", above=LARGE)
def _(x: Array, shape: tuple[int, ...], indices: Any, axis: int) -> Any:
    return kernels.indexing.untake(x, shape, indices, axis)


@_untake.kernel("cuda")  # a GPU's add.at adds in any order
def _(x: Array, shape: tuple[int, ...], indices: Any, axis: int) -> Any:
    return kernels.gpu.untake(x, shape, indices, axis)


def take(x: Tensor, indices: Any, axis: int = 0) -> Tensor:
    """Entries of `x` along `axis` at integer `indices`, whose axes replace it. Raises IndexError out of range."""
    axis = check_axis("take", axis, x.ndim)
    return _take(x, checked_indices("take", indices, x, x.shape[axis]), axis)


def embedding(indices: Any, weight: Tensor) -> Tensor:
    """Rows of `weight` (entries, size) at integer `indices` of any shape, giving (*indices.shape, size)."""
    return _take(weight, checked_indices("embedding", indices, weight, weight.shape[0], wrap=False), 0)


@op(dtypes="any", name="gather", flops=no_flops)
def gather_checked(xp: Any, x: Array, index: Any, axis: int) -> Array:
    """`gather` by an array of indices that are known to be in range."""
    return xp.take_along_axis(x, index, axis)


@gather_checked.vjp
def _(g: Tensor, shapes: Any, index: Any, axis: int) -> Tensor:
    return _scatter_add(Tensor(array_module(g.data).zeros(shapes[0], g.dtype)), g, index, axis)


@gather_checked.kernel("cuda")
def _(x: Array, index: Any, axis: int) -> Any:
    return kernels.gpu.gather(x, index, axis % x.ndim)


@gather_checked.kernel_backward("cuda")
def _(g: Array, shapes: Any, index: Any, axis: int) -> Any:
    return kernels.gpu.gather_backward(g, shapes[0], index, axis % g.ndim)


@op(dtypes="same", name="scatter_add")
def _scatter_add(xp: Any, x: Array, src: Array, index: Any, axis: int) -> Array:
    result = x.copy()
    where = list(xp.ogrid[tuple(slice(n) for n in index.shape)])
    where[axis] = index
    xp.add.at(result, tuple(where), src)
    return result


@_scatter_add.vjp("x")
def _(g: Tensor) -> Tensor:
    return g


@_scatter_add.vjp("src")
def _(g: Tensor, index: Any, axis: int) -> Tensor:
    return gather_checked(g, index, axis)


@_scatter_add.kernel("cuda")
def _(x: Array, src: Array, index: Any, axis: int) -> Any:
    return kernels.gpu.scatter_add(x, src, index, axis)


def gather(x: Tensor, axis: int, index: Any) -> Tensor:
    """out[i][j] = x[index[i][j]][j] for axis 0, and so on; `index` has x's sizes but on `axis`. Raises IndexError."""
    axis = check_axis("gather", axis, x.ndim)
    index = checked_indices("gather", index, x, x.shape[axis])
    _check_alike("gather", x.shape, index.shape, axis)
    return gather_checked(x, index, axis)


def scatter_add(x: Tensor, axis: int, index: Any, src: Any) -> Tensor:
    """`x` with each of `src` added at the place along `axis` that `index` (src's shape) names: the transpose of `gather`."""
    axis = check_axis("scatter_add", axis, x.ndim)
    index = checked_indices("scatter_add", index, x, x.shape[axis])
    _check_alike("scatter_add", x.shape, index.shape, axis)
    src = as_tensor(src)
    if src.shape != index.shape:
        raise ValueError(f"scatter_add: src has shape {src.shape}, but index {index.shape}; they must agree")
    return _scatter_add(x, src, index, axis)


def _check_alike(name: str, shape: tuple[int, ...], index: tuple[int, ...], axis: int) -> None:
    if len(shape) != len(index) or any(n != m for i, (n, m) in enumerate(zip(shape, index)) if i != axis):
        raise ValueError(f"{name}: index has shape {index}, which must agree with {shape} but on axis {axis}")


@op(dtypes="any", flops=no_flops)
def upsample_nearest2d(xp: Any, x: Array) -> Array:
    """(N, H, W, C) to (N, 2H, 2W, C), each pixel four times."""
    n, h, w, c = x.shape
    return xp.broadcast_to(x[:, :, None, :, None], (n, h, 2, w, 2, c)).reshape(n, 2 * h, 2 * w, c)


@upsample_nearest2d.vjp
def _(g: Tensor) -> Tensor:
    n, h, w, c = g.shape
    return sum(reshape(g, (n, h // 2, 2, w // 2, 2, c)), axis=(2, 4))


@upsample_nearest2d.kernel("numpy", above=LARGE)
def _(x: Array) -> Any:
    return kernels.resample.upsample_nearest2d(x)


@upsample_nearest2d.kernel_backward("numpy")
def _(g: Array) -> Any:
    return kernels.resample.upsample_nearest2d_backward(g)


@upsample_nearest2d.kernel("cuda", above=LARGE)
def _(x: Array) -> Any:
    return kernels.gpu.upsample_nearest2d(x)


@upsample_nearest2d.kernel_backward("cuda")
def _(g: Array) -> Any:
    return kernels.gpu.upsample_nearest2d_backward(g)
