"""Elementwise ops, broadcasting like NumPy. Gradients of broadcast inputs are summed back by the tape, in one place."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tinydiff import kernels
from tinydiff.backend import Array, check_device, check_dtype, special, to_device
from tinydiff.op import op
from tinydiff.tensor import Tensor, as_tensor, beside

TWO_OVER_SQRT_PI = 2 / math.sqrt(math.pi)


# Casting.


@op(dtypes="any", name="astype")
def _astype(xp: Any, x: Array, dtype: Any) -> Array:
    return x.astype(dtype)


@_astype.vjp
def _(g: Tensor, x: Tensor) -> Tensor:
    return astype(g, x.dtype)


def astype(x: Tensor, dtype: Any) -> Tensor:
    """`x` converted to `dtype`; the gradient is converted back. Integers and booleans end the gradient's way."""
    dtype, x = check_dtype(dtype), as_tensor(x)
    return _astype(x, dtype) if dtype.kind == "f" else Tensor(x.data.astype(dtype))


# Moving between devices.


@op(dtypes="any", view=True, name="to", flops=lambda *arrays, **params: 0)
def _to(xp: Any, x: Array, device: str, source: str) -> Array:
    return to_device(x, device)


@_to.vjp
def _(g: Tensor, device: str, source: str) -> Tensor:
    return _to(g, source, device)


def to(x: Tensor, device: str) -> Tensor:
    """`x` on `device`: itself if it is there, else a copy, whose gradient is moved back.

    Raises ValueError for an unknown device, RuntimeError for one that is not available.
    """
    x, device = as_tensor(x), check_device(device)
    return x if x.device == device else _to(x, device, x.device)


# Arithmetic.


@op(dtypes="same")
def add(xp: Any, x: Array, y: Array) -> Array:
    """x + y."""
    return xp.add(x, y)


@add.kernel("numpy", above=1 << 16)
def _(x: Array, y: Array) -> Any:
    return kernels.activation.add(x, y)


@add.vjp("x")
def _(g: Tensor) -> Tensor:
    return g


@add.vjp("y")
def _(g: Tensor) -> Tensor:
    return g


@op(dtypes="same")
def sub(xp: Any, x: Array, y: Array) -> Array:
    """x - y."""
    return xp.subtract(x, y)


@sub.vjp("x")
def _(g: Tensor) -> Tensor:
    return g


@sub.vjp("y")
def _(g: Tensor) -> Tensor:
    return neg(g)


@op(dtypes="same")
def mul(xp: Any, x: Array, y: Array) -> Array:
    """x · y."""
    return xp.multiply(x, y)


@mul.vjp("x")
def _(g: Tensor, y: Any) -> Tensor:
    return mul(g, y)


@mul.vjp("y")
def _(g: Tensor, x: Any) -> Tensor:
    return mul(g, x)


@op
def div(xp: Any, x: Array, y: Array) -> Array:
    """x / y, of floats (integers become float32)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return xp.true_divide(x, y)


@div.vjp("x")
def _(g: Tensor, y: Any) -> Tensor:
    return div(g, y)


@div.vjp("y")
def _(g: Tensor, x: Any, y: Any) -> Tensor:
    return neg(div(mul(g, x), mul(y, y)))


@op(dtypes="same")
def neg(xp: Any, x: Array) -> Array:
    """-x. Raises TypeError for booleans."""
    return xp.negative(x)


@neg.vjp
def _(g: Tensor) -> Tensor:
    return neg(g)


@op
def pow(xp: Any, x: Array, exponent: Array) -> Array:
    """x ** exponent, of floats. The derivative at x = 0 of x ** 0 is 0, and so is the one by the exponent at x = 0."""
    return xp.power(x, exponent)


@pow.vjp("x")
def _(g: Tensor, x: Any, exponent: Any) -> Tensor:
    if not isinstance(exponent, Tensor):
        if exponent == 0:
            return mul(g, mul(x, 0.0))
        return mul(g, mul(x if exponent == 2 else pow(x, exponent - 1), float(exponent)))
    both = (x.data == 0) & (exponent.data == 0)  # where the derivative is 0, but 0 · 0⁻¹ would be NaN
    powered = pow(x, where(both, 1.0, exponent - 1.0))
    return mul(g, mul(exponent, powered))


@pow.vjp("exponent")
def _(g: Tensor, x: Any, exponent: Any) -> Tensor:
    if not isinstance(x, Tensor):
        return mul(g, mul(pow(x, exponent), math.log(x) if x > 0 else 0.0))
    zero = x == 0
    return mul(g, where(zero, 0.0, mul(pow(x, exponent), log(where(zero, 1.0, x)))))


# Exponentials and roots.


@op
def exp(xp: Any, x: Array) -> Array:
    """eˣ."""
    return xp.exp(x)


@exp.kernel("numpy", above=1 << 18)
def _(x: Array) -> Any:
    return kernels.activation.exp(x)


@exp.vjp
def _(g: Tensor, out: Tensor) -> Tensor:
    return mul(g, out)


@op
def expm1(xp: Any, x: Array) -> Array:
    """eˣ - 1, accurate near 0."""
    return xp.expm1(x)


@expm1.vjp
def _(g: Tensor, x: Tensor) -> Tensor:
    return mul(g, exp(x))


@op
def log(xp: Any, x: Array) -> Array:
    """The natural logarithm; -inf at 0 and NaN below."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return xp.log(x)


@log.kernel("numpy", above=1 << 18)
def _(x: Array) -> Any:
    return kernels.activation.log(x)


@log.vjp
def _(g: Tensor, x: Tensor) -> Tensor:
    return div(g, x)


@op
def log1p(xp: Any, x: Array) -> Array:
    """log(1 + x), accurate near 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return xp.log1p(x)


@log1p.vjp
def _(g: Tensor, x: Tensor) -> Tensor:
    return div(g, add(x, 1.0))


@op
def sqrt(xp: Any, x: Array) -> Array:
    """√x; NaN below 0. The gradient is infinite at 0."""
    with np.errstate(invalid="ignore"):
        return xp.sqrt(x)


@sqrt.vjp
def _(g: Tensor, out: Tensor) -> Tensor:
    return div(mul(g, 0.5), out)


@op
def rsqrt(xp: Any, x: Array) -> Array:
    """1/√x."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return 1 / xp.sqrt(x)


@rsqrt.vjp
def _(g: Tensor, x: Tensor, out: Tensor) -> Tensor:
    return div(mul(mul(g, -0.5), out), x)


@op
def sin(xp: Any, x: Array) -> Array:
    """Sine of x in radians."""
    return xp.sin(x)


@sin.vjp
def _(g: Tensor, x: Tensor) -> Tensor:
    return mul(g, cos(x))


@op
def cos(xp: Any, x: Array) -> Array:
    """Cosine of x in radians."""
    return xp.cos(x)


@cos.vjp
def _(g: Tensor, x: Tensor) -> Tensor:
    return neg(mul(g, sin(x)))


@op
def erf(xp: Any, x: Array) -> Array:
    """The error function 2/√π ∫₀ˣ exp(-t²) dt."""
    return special(xp).erf(x)


@erf.kernel("numpy", above=1024)
def _(x: Array) -> Any:
    return kernels.activation.erf(x)


@erf.vjp
def _(g: Tensor, x: Tensor) -> Tensor:
    return mul(g, mul(exp(neg(mul(x, x))), TWO_OVER_SQRT_PI))


# Choices. Where two arguments tie, the gradient is shared between them equally.


@op(dtypes="same")
def abs(xp: Any, x: Array) -> Array:
    """|x|. The derivative at 0 is 0."""
    return xp.abs(x)


@abs.vjp
def _(g: Tensor, x: Tensor) -> Tensor:
    return mul(g, sign(x))


@op(dtypes="same")
def maximum(xp: Any, x: Array, y: Array) -> Array:
    """The larger of x and y, NaN if either is."""
    return xp.maximum(x, y)


@op(dtypes="same")
def minimum(xp: Any, x: Array, y: Array) -> Array:
    """The smaller of x and y, NaN if either is."""
    return xp.minimum(x, y)


@maximum.vjp("x")
def _(g: Tensor, x: Any, y: Any) -> Tensor:
    return mul(g, _share(x, y, g.dtype))


@maximum.vjp("y")
def _(g: Tensor, x: Any, y: Any) -> Tensor:
    return mul(g, _share(y, x, g.dtype))


@minimum.vjp("x")
def _(g: Tensor, x: Any, y: Any) -> Tensor:
    return mul(g, _share(y, x, g.dtype))


@minimum.vjp("y")
def _(g: Tensor, x: Any, y: Any) -> Tensor:
    return mul(g, _share(x, y, g.dtype))


def _share(x: Any, y: Any, dtype: Any) -> Tensor:
    """1 where x > y, ½ where equal, else 0."""
    return add(astype(gt(x, y), dtype), mul(astype(eq(x, y), dtype), 0.5))


@op(dtypes="same", name="clip")
def _clip(xp: Any, x: Array, min: Any, max: Any) -> Array:
    return x.copy() if min is None and max is None else xp.clip(x, min, max)


@_clip.vjp
def _(g: Tensor, x: Tensor, min: Any, max: Any) -> Tensor:
    inside = x.data == x.data
    if min is not None:
        inside &= x.data >= min
    if max is not None:
        inside &= x.data <= max
    return mul(g, Tensor(inside.astype(g.dtype)))


def clip(x: Tensor, min: float | None = None, max: float | None = None) -> Tensor:
    """x held between the numbers `min` and `max` (None: no bound). The derivative is 1 inside and at the bounds, else 0.

    Raises TypeError for a bound that is no number: gradients would not reach it (use `maximum` and `minimum`).
    """
    bounds = [bound.item() if isinstance(bound, np.generic) else bound for bound in (min, max)]
    for bound in bounds:
        if bound is not None and not isinstance(bound, int | float):
            raise TypeError(f"clip: a bound must be a number or None, not {type(bound).__name__}; see maximum and minimum")
    x = as_tensor(x)
    if x.dtype.kind != "f" and any(isinstance(bound, float) for bound in bounds):
        x = astype(x, np.float32)
    return _clip(x, *bounds)


@op(dtypes="same", name="where")
def _where(xp: Any, x: Array, y: Array, condition: Any) -> Array:
    return xp.where(condition, x, y)


@_where.vjp("x")
def _(g: Tensor, condition: Any) -> Tensor:
    return mul(g, Tensor(condition.astype(g.dtype)))


@_where.vjp("y")
def _(g: Tensor, condition: Any) -> Tensor:
    return mul(g, Tensor((~condition).astype(g.dtype)))


def where(condition: Any, x: Any, y: Any) -> Tensor:
    """x where the boolean `condition` holds, else y; all three broadcast. Raises TypeError for a condition of numbers."""
    values = next((t.data for t in (x, y) if isinstance(t, Tensor)), None)
    mask = beside(condition, values)
    if values is None:
        x = Tensor(beside(as_tensor(x).data, mask))
    if mask.dtype != bool:
        raise TypeError(f"where needs a boolean condition, not {mask.dtype}; compare with something, as in `x > 0`")
    return _where(x, y, mask)


# Not differentiable: comparisons give booleans, sign a piecewise constant.


@op(dtypes="same")
def eq(xp: Any, x: Array, y: Array) -> Array:
    """x == y, as booleans."""
    return xp.equal(x, y)


@op(dtypes="same")
def ne(xp: Any, x: Array, y: Array) -> Array:
    """x != y, as booleans."""
    return xp.not_equal(x, y)


@op(dtypes="same")
def lt(xp: Any, x: Array, y: Array) -> Array:
    """x < y, as booleans."""
    return xp.less(x, y)


@op(dtypes="same")
def le(xp: Any, x: Array, y: Array) -> Array:
    """x <= y, as booleans."""
    return xp.less_equal(x, y)


@op(dtypes="same")
def gt(xp: Any, x: Array, y: Array) -> Array:
    """x > y, as booleans."""
    return xp.greater(x, y)


@op(dtypes="same")
def ge(xp: Any, x: Array, y: Array) -> Array:
    """x >= y, as booleans."""
    return xp.greater_equal(x, y)


@op(dtypes="any")
def logical_and(xp: Any, x: Array, y: Array) -> Array:
    """x and y, of booleans (or of numbers: not 0), as booleans."""
    return xp.logical_and(x, y)


@op(dtypes="any")
def logical_or(xp: Any, x: Array, y: Array) -> Array:
    """x or y, of booleans (or of numbers: not 0), as booleans."""
    return xp.logical_or(x, y)


@op(dtypes="any")
def logical_not(xp: Any, x: Array) -> Array:
    """not x, of booleans (or of numbers: not 0), as booleans."""
    return xp.logical_not(x)


@op(dtypes="same")
def sign(xp: Any, x: Array) -> Array:
    """-1, 0 or 1."""
    return xp.sign(x)
