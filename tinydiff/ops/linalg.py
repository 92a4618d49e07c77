"""Matrix products."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tinydiff import kernels
from tinydiff.backend import Array
from tinydiff.op import fused, op
from tinydiff.ops.activation import SMALL
from tinydiff.ops.elementwise import add
from tinydiff.ops.shape import broadcast_to, reshape, transpose, unsqueeze
from tinydiff.tensor import Tensor


@op(flops=lambda out, x, y: 2 * out.size * x.shape[-1])
def matmul(xp: Any, x: Array, y: Array) -> Array:
    """x @ y as in NumPy: (…, M, K) with (…, K, N), leading axes broadcast; a 1-D side counts as a row or a column.

    Raises ValueError when the inner sizes differ.
    """
    return xp.matmul(x, y)


@matmul.kernel("numpy")
def _(x: Array, y: Array) -> Any:
    if x.dtype != np.float32 or x.ndim < 2 or getattr(y, "ndim", 0) < 2 or x.size * y.shape[-1] < 1 << 19:
        return NotImplemented  # not worth importing Numba for
    if x.shape[-1] != y.shape[-2]:  # the definition says what is wrong; a kernel would read past the end
        return NotImplemented
    return kernels.gemm.matmul(x, y)


@matmul.vjp("x")
def _(g: Tensor, y: Tensor, shapes: Any) -> Tensor:
    if shapes[1] is not None and len(shapes[1]) == 1:
        return unsqueeze(g, -1) * y
    if len(shapes[0]) == 1:
        return matmul(unsqueeze(g, -2), transpose(y, -1, -2)).reshape((*g.shape[:-1], shapes[0][0]))
    return matmul(g, transpose(y, -1, -2))


@matmul.vjp("y")
def _(g: Tensor, x: Tensor, shapes: Any) -> Tensor:
    if len(shapes[0]) == 1:
        return x * g if len(shapes[1]) == 1 else unsqueeze(x, -1) * unsqueeze(g, -2)
    if len(shapes[1]) == 1:
        return matmul(transpose(x, -1, -2), unsqueeze(g, -1)).reshape((*x.shape[:-2], shapes[1][0]))
    if len(shapes[1]) == 2:  # one product over all rows, not a sum of products
        rows = math.prod(shapes[0][:-1])
        x, g = reshape(x, (rows, shapes[0][-1])), reshape(g, (rows, shapes[1][-1]))
    return matmul(transpose(x, -1, -2), g)


@fused(flops=lambda out, x, *rest: 2 * out.size * x.shape[-1])
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """x @ weight + bias + residual for x (…, in), weight (in, out), bias (out,), residual (…, out).

    Raises ValueError when sizes disagree.
    """
    if weight.ndim != 2 or x.shape[-1:] != weight.shape[:1]:
        raise ValueError(
            f"linear: x has shape {x.shape}, so weight must be ({x.shape[-1] if x.ndim else '?'}, out), not {weight.shape}"
        )
    flat = x if x.ndim == 2 else reshape(x, (math.prod(x.shape[:-1]), x.shape[-1]))
    y = matmul(flat, weight)
    if bias is not None:
        y = add(y, bias)
    y = y if x.ndim == 2 else reshape(y, (*x.shape[:-1], weight.shape[1]))
    return y if residual is None else add(y, residual)


def _fits(x: Array, weight: Array, bias: Any, residual: Any) -> bool:
    """Whether the sizes agree: else the composition says what is wrong, or broadcasts."""
    if x.ndim == 0 or weight.ndim != 2 or x.shape[-1] != len(weight) or (bias is not None and bias.shape != weight.shape[1:]):
        return False
    return residual is None or residual.shape == (*x.shape[:-1], weight.shape[1])


@linear.kernel("numpy")  # the composition's products without the composition's ops, which take longer than they do
def _(x: Array, weight: Array, bias: Any, residual: Any) -> Any:
    if not _fits(x, weight, bias, residual):
        return NotImplemented
    y = (x if x.ndim == 2 else x.reshape(-1, len(weight))) @ weight
    if bias is not None:
        y += bias
    y = y if x.ndim == 2 else y.reshape(*x.shape[:-1], weight.shape[1])
    return y if residual is None else np.add(y, residual, out=y)


@linear.kernel_backward("numpy")
def _(g: Array, x: Array, weight: Array, bias: Any, residual: Any, needs: Any) -> Any:
    if not _fits(x, weight, bias, residual):
        return NotImplemented
    rows, g_rows = x.reshape(-1, len(weight)), g.reshape(-1, weight.shape[1])
    gx = (g_rows @ weight.T).reshape(x.shape) if needs[0] else None
    return gx, rows.T @ g_rows if needs[1] else None, kernels.sums.sum_rows(g_rows[None])[0] if needs[2] else None, g


@linear.kernel("numpy", above=SMALL)
def _(x: Array, weight: Array, bias: Any, residual: Any) -> Any:
    return kernels.gemm.linear(x, weight, bias, residual) if _fits(x, weight, bias, residual) else NotImplemented


@linear.kernel_backward("numpy")
def _(g: Array, x: Array, weight: Array, bias: Any, needs: Any) -> Any:
    found = kernels.gemm.linear_backward(g, x, weight, bias, needs)
    return found if found is NotImplemented else (*found, g)


@op(name="einsum")
def _einsum(xp: Any, *operands: Array, subscripts: str) -> Array:
    result = xp.einsum(subscripts, *operands, optimize=True)
    return result.copy() if len(operands) == 1 else result  # of one operand it may be a view


@_einsum.vjp
def _(g: Tensor, operands: Any, shapes: Any, subscripts: str, needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    inputs, output = subscripts.split("->")
    terms = inputs.split(",")
    found: list[Tensor | None] = []
    for i, (term, need) in enumerate(zip(terms, needs)):
        if not need:
            found.append(None)
            continue
        others = [t for j, t in enumerate(terms) if j != i]
        # Letters that appear nowhere else were summed away: their gradient is the same all along them.
        kept = "".join(c for c in term if c in output or any(c in t for t in others))
        part = _einsum(g, *[x for j, x in enumerate(operands) if j != i], subscripts=",".join([output, *others]) + "->" + kept)
        sizes = dict(zip(kept, part.shape))
        lifted = reshape(part, tuple(sizes.get(c, 1) for c in term))
        # Along a letter where this operand was broadcast, `part` is larger than it, and the tape sums.
        found.append(lifted if kept == term else broadcast_to(lifted, tuple(map(max, lifted.shape, shapes[i]))))
    return tuple(found)


def einsum(subscripts: str, *operands: Any) -> Tensor:
    """The sum of products that `subscripts` describes, as `numpy.einsum`, with "..." but without diagonals ("ii").

    Raises ValueError for subscripts that don't fit the operands.
    """
    terms, arrow, output = subscripts.replace(" ", "").partition("->")
    parts = terms.split(",")
    if len(parts) != len(operands):
        raise ValueError(f"einsum: {subscripts!r} describes {len(parts)} operands, not {len(operands)}")
    spare = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in subscripts]
    widest = 0
    for i, (part, operand) in enumerate(zip(parts, operands)):
        if "..." in part:
            extra = len(operand.shape) - len(part) + 3
            widest = max(widest, extra)
            parts[i] = part.replace("...", "".join(reversed(spare[:extra])))
        if len(parts[i]) != len(operand.shape) or len(set(parts[i])) != len(parts[i]):
            raise ValueError(
                f"einsum: term {part!r} of {subscripts!r} does not fit shape {tuple(operand.shape)} with each letter once"
            )
    batch = "".join(reversed(spare[:widest]))
    if not arrow:
        letters = "".join(parts)
        output = batch + "".join(sorted(c for c in set(letters) - set(batch) if letters.count(c) == 1))
    output = output.replace("...", batch)
    if len(set(output)) != len(output) or not set(output) <= set("".join(parts)):
        raise ValueError(f"einsum: output {output!r} of {subscripts!r} must use letters of the operands, each once")
    return _einsum(*operands, subscripts=",".join(parts) + "->" + output)
