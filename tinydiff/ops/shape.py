"""Ops that move values without changing them. Results may be views of the input."""

from __future__ import annotations

import builtins
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tinydiff import kernels
from tinydiff.backend import Array
from tinydiff.op import LARGE, op
from tinydiff.tensor import Tensor

SUMMED = 1024  # elements from which their sum as a product is faster than NumPy's own


def check_axis(name: str, axis: int, ndim: int) -> int:
    """The axis counted from the front. Raises IndexError, naming the op, for one that isn't there."""
    if not -ndim <= axis < ndim:
        raise IndexError(f"{name}: axis {axis} is out of range for {ndim} axes; use {-ndim} to {ndim - 1}")
    return axis % ndim


def no_flops(out: Array, *inputs: Any, **params: Any) -> int:
    """Copying computes nothing."""
    return 0


@op(dtypes="any", view=True, name="reshape")
def _reshape(xp: Any, x: Array, shape: tuple[int, ...]) -> Array:
    return x.reshape(shape)


@_reshape.vjp
def _(g: Tensor, shapes: Any) -> Tensor:
    return reshape(g, shapes[0])


def reshape(x: Tensor, *shape: Any) -> Tensor:
    """`x` with other sizes, in the same order; one of them may be -1. Raises ValueError when the number of elements differs."""
    sizes = shape[0] if len(shape) == 1 and not isinstance(shape[0], int | np.integer) else shape
    return _reshape(x, tuple(sizes))


def flatten(x: Tensor, start_axis: int = 0) -> Tensor:
    """`x` with the axes from `start_axis` on joined into one."""
    return reshape(x, (*x.shape[:start_axis], math.prod(x.shape[start_axis:])))


@op(dtypes="any", view=True, name="permute")
def _permute(xp: Any, x: Array, axes: tuple[int, ...]) -> Array:
    return x.transpose(axes)


@_permute.vjp
def _(g: Tensor, axes: tuple[int, ...]) -> Tensor:
    inverse = [0] * len(axes)
    for new, old in enumerate(axes):
        inverse[old] = new
    return _permute(g, tuple(inverse))


def permute(x: Tensor, *axes: Any) -> Tensor:
    """`x` with its axes in the order `axes`. Raises ValueError unless each axis is named once."""
    order = axes[0] if len(axes) == 1 and not isinstance(axes[0], int | np.integer) else axes
    found = tuple(a % x.ndim if -x.ndim <= a < x.ndim else a for a in order)
    if sorted(found) != list(range(x.ndim)):
        raise ValueError(f"permute: {tuple(order)} does not name each of the {x.ndim} axes of shape {x.shape} once")
    return _permute(x, found)


def transpose(x: Tensor, axis0: int | None = None, axis1: int | None = None) -> Tensor:
    """`x` with two axes exchanged, or with all axes reversed when none are named."""
    order = list(range(x.ndim))
    if axis0 is None or axis1 is None:
        return permute(x, order[::-1])
    axis0, axis1 = check_axis("transpose", axis0, x.ndim), check_axis("transpose", axis1, x.ndim)
    order[axis0], order[axis1] = order[axis1], order[axis0]
    return permute(x, order)


@op(dtypes="any", view=True)
def broadcast_to(xp: Any, x: Array, shape: Any) -> Array:
    """`x` repeated to `shape` by NumPy's rule, without a copy. Raises ValueError when it doesn't fit."""
    return xp.broadcast_to(x, shape)


@broadcast_to.vjp
def _(g: Tensor, shapes: Any) -> Tensor:
    return sum_to(g, shapes[0])


def expand(x: Tensor, *sizes: Any) -> Tensor:
    """`x` broadcast to `sizes`, where -1 keeps an axis's size."""
    wanted = tuple(sizes[0] if len(sizes) == 1 and not isinstance(sizes[0], int | np.integer) else sizes)
    offset = len(wanted) - x.ndim
    if any(n == -1 for n in wanted[: max(offset, 0)]):
        raise ValueError(f"expand: -1 keeps a size, and the first {offset} axes of {wanted} are new to shape {x.shape}")
    return broadcast_to(x, tuple(x.shape[i - offset] if n == -1 else n for i, n in enumerate(wanted)))


@op(dtypes="any")
def sum_to(xp: Any, x: Array, shape: tuple[int, ...]) -> Array:
    """`x` summed over the axes along which `shape` would broadcast to it: where the tape undoes broadcasting.

    Raises ValueError when `shape` does not broadcast to x's.
    """
    return x.sum(axis=_broadcast_axes(x.shape, shape)).reshape(shape)


def _broadcast_axes(wide: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of `wide` that broadcasting `shape` to it repeats. Raises ValueError when it doesn't broadcast so."""
    extra = len(wide) - len(shape)
    if extra < 0 or any(n not in (1, m) for n, m in zip(shape, wide[extra:])):
        raise ValueError(f"a gradient of shape {wide} does not fit an input of shape {shape}")
    return (*range(extra), *(i + extra for i, n in enumerate(shape) if n == 1 and wide[i + extra] != 1))


@sum_to.kernel("numpy", above=SUMMED)
def _(x: Array, shape: tuple[int, ...]) -> Any:
    total = kernels.sums.sum_axes(x, _broadcast_axes(x.shape, shape))
    return total if total is NotImplemented else total.reshape(shape)


@sum_to.kernel("cuda", above=LARGE)
def _(x: Array, shape: tuple[int, ...]) -> Any:
    total = kernels.gpu.sum_rows(x, _broadcast_axes(x.shape, shape))
    return total if total is NotImplemented else total.reshape(shape)


@sum_to.vjp
def _(g: Tensor, shapes: Any) -> Tensor:
    return broadcast_to(g, shapes[0])


def squeeze(x: Tensor, axis: int | Sequence[int] | None = None) -> Tensor:
    """`x` without its axes of size 1, or without those in `axis`. Raises ValueError when one of them is not of size 1."""
    if axis is None:
        return reshape(x, tuple(n for n in x.shape if n != 1))
    axes = {check_axis("squeeze", a, x.ndim) for a in ([axis] if isinstance(axis, int | np.integer) else axis)}
    wrong = [a for a in axes if x.shape[a] != 1]
    if wrong:
        raise ValueError(f"squeeze: axis {wrong[0]} of shape {x.shape} has size {x.shape[wrong[0]]}, not 1")
    return reshape(x, tuple(n for i, n in enumerate(x.shape) if i not in axes))


def unsqueeze(x: Tensor, axis: int) -> Tensor:
    """`x` with a new axis of size 1 at `axis`."""
    at = check_axis("unsqueeze", axis, x.ndim + 1)
    return reshape(x, (*x.shape[:at], 1, *x.shape[at:]))


@op(dtypes="same", name="concat", flops=no_flops)
def _concat(xp: Any, *tensors: Array, axis: int = 0) -> Array:
    return xp.concatenate(tensors, axis=axis)


@_concat.vjp
def _(g: Tensor, shapes: Any, axis: int, needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    axis %= g.ndim
    found: list[Tensor | None] = []
    start = 0
    for shape, need in zip(shapes, needs):
        end = start + shape[axis]
        found.append(getitem(g, (builtins.slice(None),) * axis + (builtins.slice(start, end),)) if need else None)
        start = end
    return tuple(found)


@_concat.kernel("numpy", above=LARGE)
def _(*tensors: Array, axis: int) -> Any:
    return kernels.concat.concat_last(tensors) if axis in (-1, tensors[0].ndim - 1) else NotImplemented


@_concat.kernel_backward("numpy")
def _(g: Array, shapes: Any, axis: int, needs: Sequence[bool]) -> Any:
    if axis not in (-1, g.ndim - 1):
        return NotImplemented
    return kernels.concat.split_last(g, [shape[-1] for shape in shapes], needs)


def concat(tensors: Sequence[Any], axis: int = 0) -> Tensor:
    """The tensors one after another along `axis`; their other sizes must agree. Raises ValueError for none or a misfit."""
    tensors = list(tensors)
    if not tensors:
        raise ValueError("concat needs at least one tensor, and got an empty list")
    shapes = [tuple(t.shape) for t in tensors]
    axis = check_axis("concat", axis, len(shapes[0])) if shapes[0] else 0
    if not shapes[0] or any(
        len(s) != len(shapes[0]) or s[:axis] + s[axis + 1 :] != shapes[0][:axis] + shapes[0][axis + 1 :] for s in shapes
    ):
        raise ValueError(f"concat: shapes {', '.join(map(str, shapes))} must have axes and agree but on axis {axis}")
    return _concat(*tensors, axis=axis)


def stack(tensors: Sequence[Tensor], axis: int = 0) -> Tensor:
    """Tensors of one shape, side by side along a new `axis`."""
    shapes = {tuple(t.shape) for t in tensors}
    if len(shapes) != 1:
        raise ValueError(f"stack needs tensors of one shape, not {sorted(shapes) or 'none at all'}")
    return concat([unsqueeze(t, axis) for t in tensors], axis)


def split(x: Tensor, size_or_sizes: int | Sequence[int], axis: int = 0) -> list[Tensor]:
    """`x` cut along `axis` into pieces of one size (the last may be smaller), or of the sizes given (which must add up)."""
    axis = check_axis("split", axis, x.ndim)
    total = x.shape[axis]
    if isinstance(size_or_sizes, int | np.integer):
        if size_or_sizes < 1:
            raise ValueError(f"split: the size must be at least 1, not {size_or_sizes}")
        sizes = [builtins.min(size_or_sizes, total - start) for start in range(0, total, size_or_sizes)]
    else:
        sizes = list(size_or_sizes)
        if any(size < 0 for size in sizes):
            raise ValueError(f"split: sizes {sizes} must not be negative")
        if builtins.sum(sizes) != total:
            raise ValueError(
                f"split: sizes {sizes} add up to {builtins.sum(sizes)}, but axis {axis} of shape {x.shape} has {total}"
            )
    pieces, start = [], 0
    for size in sizes:
        pieces.append(getitem(x, (builtins.slice(None),) * axis + (builtins.slice(start, start + size),)))
        start += size
    return pieces


@op(dtypes="any", name="pad", flops=no_flops)
def _pad(xp: Any, x: Array, widths: tuple[tuple[int, int], ...], value: float = 0.0) -> Array:
    return xp.pad(x, widths, constant_values=value)


@_pad.vjp
def _(g: Tensor, shapes: Any, widths: Any) -> Tensor:
    return getitem(g, tuple(builtins.slice(before, before + n) for (before, _), n in zip(widths, shapes[0])))


def pad(x: Tensor, widths: Sequence[Sequence[int]], value: float = 0.0) -> Tensor:
    """`x` with `value` around it: `widths` has (before, after) per axis. Raises ValueError for a wrong count or below 0."""
    pairs = tuple((int(a), int(b)) for a, b in widths)
    if len(pairs) != x.ndim or any(n < 0 for pair in pairs for n in pair):
        raise ValueError(f"pad: widths {pairs} must be {x.ndim} pairs of non-negative numbers for shape {x.shape}")
    return _pad(x, pairs, value)


@op(dtypes="any", view=True)
def flip(xp: Any, x: Array, axis: int | Sequence[int]) -> Array:
    """`x` backwards along `axis`."""
    return xp.flip(x, axis if isinstance(axis, int | np.integer) else tuple(axis))


@flip.vjp
def _(g: Tensor, axis: Any) -> Tensor:
    return flip(g, axis)


def repeat(x: Tensor, *times: Any) -> Tensor:
    """`x` tiled `times` along each axis (as PyTorch's `repeat`); more numbers than axes add axes in front."""
    counts = tuple(times[0] if len(times) == 1 and not isinstance(times[0], int | np.integer) else times)
    if len(counts) < x.ndim:
        raise ValueError(f"repeat: {len(counts)} numbers for {x.ndim} axes; give one for each axis")
    shape = (1,) * (len(counts) - x.ndim) + x.shape
    spread = broadcast_to(
        reshape(x, tuple(m for n in shape for m in (1, n))), tuple(m for t, n in zip(counts, shape) for m in (t, n))
    )
    return reshape(spread, tuple(t * n for t, n in zip(counts, shape)))


# Basic indexing: integers, slices, None and Ellipsis.


@op(dtypes="any", view=True, name="getitem")
def _getitem(xp: Any, x: Array, index: Any) -> Array:
    return x[index]


@_getitem.vjp
def _(g: Tensor, shapes: Any, index: Any) -> Tensor:
    return place(g, shapes[0], index)


@op(dtypes="any", flops=no_flops)
def place(xp: Any, x: Array, shape: tuple[int, ...], index: Any) -> Array:
    """Zeros of `shape` with `x` at the basic `index`: the transpose of slicing."""
    result = xp.zeros(shape, x.dtype)
    result[index] = x
    return result


@place.vjp
def _(g: Tensor, index: Any) -> Tensor:
    return getitem(g, index)


def getitem(x: Tensor, index: Any) -> Tensor:
    """`x[index]`: integers, slices, None and `...` give views; one integer tensor or array takes along the first axis.

    Raises IndexError out of range, TypeError for other kinds of index (use `take`, `gather` or `where`).
    """
    parts = index if isinstance(index, tuple) else (index,)
    if all(type(p) is int or isinstance(p, builtins.slice) or p is None or p is Ellipsis for p in parts):
        return _getitem(x, parts)
    kinds = [getattr(getattr(p, "dtype", None), "kind", None) for p in parts]  # NumPy's integers, and tensors of one
    parts = tuple(int(p) if kind in ("i", "u") and p.ndim == 0 else p for p, kind in zip(parts, kinds))
    if all((isinstance(p, int | builtins.slice) and not isinstance(p, bool)) or p is None or p is Ellipsis for p in parts):
        return _getitem(x, parts)
    if len(parts) == 1 and kinds[0] in ("i", "u"):
        from tinydiff.ops.indexing import take

        return take(x, parts[0], 0)
    given = ", ".join(type(p).__name__ for p in parts)
    raise TypeError(
        f"a tensor can be indexed by integers, slices, None, ... or one integer tensor, not ({given}); see take, gather, where"
    )
