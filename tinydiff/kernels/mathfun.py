"""exp, tanh, sigmoid, erf, log and GELU in float32, as short branch-free polynomials that vectorise inside any kernel's loop.

Numba turns `np.exp` in a loop into one library call a number. These are a dozen multiply-adds and no branch, so that LLVM
computes as many at once as the processor's vectors hold. Coefficients are minimax fits, relative error weighted (the sizes
stated there are the polynomial's own error); `tests/test_kernels_fused.py` holds the bounds against float64:

    exp      1.5 ulp; results below the smallest normal number, 1.2e-38, are 0
    tanh     3 ulp
    sigmoid  3 ulp; 0 below x = -88.4
    gelu     1.5e-7 |x| absolutely, its derivative 4e-7: what 1 + erf in float32 gives (see `gelu`)
    erf      2 ulp
    log      1.5 ulp, subnormal x included

Infinities and NaN give what NumPy gives. `multiply_add` is used wherever the compiler's licence to reorder sums (see `jit`)
would undo an exact split of a constant.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from tinydiff.kernels.jit import njit

_f = np.float32
_LOG2_E = _f(1.44269504)
_LN2_HIGH, _LN2_LOW = _f(0.693359375), _f(-2.12194440e-4)  # the first has 9 bits: a whole number times it is exact
_EXP_MAX, _EXP_MIN = _f(88.7228317), _f(-87.3365402)
_INF, _NAN = _f(np.inf), _f(np.nan)
_ONE, _TWO, _HALF = _f(1), _f(2), _f(0.5)
_ROUND = _f(12582912)  # 1.5 · 2²³: the sum with it is a whole number
_ONE_BITS, _SQRT_HALF_BITS = 0x3F800000, 0x3F3504F3
_MIN_NORMAL = _f(1.17549435e-38)


@intrinsic
def multiply_add(context: Any, a: Any, b: Any, c: Any) -> Any:
    """a·b + c, in one rounding where the processor can, and never rearranged."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.FloatType(), [ir.FloatType()] * 3)
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.fmuladd.f32"), arguments)

    return types.float32(types.float32, types.float32, types.float32), generate


@intrinsic
def to_bits(context: Any, x: Any) -> Any:
    """The 32 bits of a float32 as an int32."""
    return types.int32(types.float32), lambda context, builder, signature, args: builder.bitcast(args[0], ir.IntType(32))


@intrinsic
def from_bits(context: Any, x: Any) -> Any:
    """The float32 that an int32's bits are."""
    return types.float32(types.int32), lambda context, builder, signature, args: builder.bitcast(args[0], ir.FloatType())


@njit(forceinline=True)
def _reduce(x):  # type: ignore[no-untyped-def]
    """Bits of 2ⁿ less those of 1, and q, with eˣ = 2ⁿ (1 + q), n whole, |q| < 0.42. Error of the polynomial: 3e-9."""
    shifted = multiply_add(x, _LOG2_E, _ROUND)  # so large that its last bits are the whole number n
    n = shifted - _ROUND
    r = multiply_add(n, -_LN2_LOW, multiply_add(n, -_LN2_HIGH, x))
    p = multiply_add(_f(0.00138144649), r, _f(0.00836878084))
    p = multiply_add(p, r, _f(0.0416683927))
    p = multiply_add(p, r, _f(0.166665196))
    p = multiply_add(p, r, _f(0.49999994))
    return np.int32(to_bits(shifted) << 23), multiply_add(p, r * r, r)


@njit(forceinline=True)
def exp(x):  # type: ignore[no-untyped-def]
    """eˣ."""
    n, q = _reduce(x)
    y = from_bits(np.int32(to_bits(_ONE + q) + n))
    y = y if x >= _EXP_MIN else _f(0)
    return y if x <= _EXP_MAX else x + _INF  # and NaN


@njit(forceinline=True)
def exp_within(x):  # type: ignore[no-untyped-def]
    """eˣ in fewer steps, for sums and quotients: infinite from 88.376 on, 0 below -87.7."""
    x = _f(-88) if _f(-88) > x else x  # written so that NaN stays
    x = _f(89) if _f(89) < x else x
    n, q = _reduce(x)
    power = from_bits(np.int32(n + _ONE_BITS))
    return power * (_ONE + q)


@njit(forceinline=True)
def tanh(x):  # type: ignore[no-untyped-def]
    """tanh x = m/(m + 2) with m = e²ˣ - 1, which loses nothing near 0."""
    x = _f(-10) if _f(-10) > x else x
    x = _f(10) if _f(10) < x else x
    n, q = _reduce(_TWO * x)
    power = from_bits(np.int32(n + _ONE_BITS))
    m = multiply_add(power, q, power - _ONE)
    return m / (m + _TWO)


@njit(forceinline=True)
def bounded(x):  # type: ignore[no-untyped-def]
    """x within -89 and 87, beyond which `one_and_exp_of_minus` doesn't go and no sigmoid changes; NaN stays."""
    x = _f(-89) if _f(-89) > x else x
    return _f(87) if _f(87) < x else x


@njit(forceinline=True)
def one_and_exp_of_minus(x):  # type: ignore[no-untyped-def]
    """1 + e⁻ˣ of a `bounded` x: what a sigmoid divides by."""
    n, q = _reduce(-x)
    return multiply_add(from_bits(np.int32(n + _ONE_BITS)), _ONE + q, _ONE)


@njit(forceinline=True)
def sigmoid(x):  # type: ignore[no-untyped-def]
    """1/(1 + e⁻ˣ)."""
    return _ONE / one_and_exp_of_minus(bounded(x))


@njit(forceinline=True)
def gelu(x):  # type: ignore[no-untyped-def]
    """x Φ(x), with the normal distribution's Φ as ½ and an odd polynomial up to ±5.5 (absolute error 1.3e-7)."""
    v = multiply_add(x * x, _f(0.0661157), -_ONE)
    p = multiply_add(_f(0.00055350334), v, _f(-0.0013812684))
    p = multiply_add(p, v, _f(0.0009778267))
    p = multiply_add(p, v, _f(-0.001193568))
    p = multiply_add(p, v, _f(0.0042891996))
    p = multiply_add(p, v, _f(-0.0077138874))
    p = multiply_add(p, v, _f(0.010439341))
    p = multiply_add(p, v, _f(-0.014651064))
    p = multiply_add(p, v, _f(0.02029603))
    p = multiply_add(p, v, _f(-0.026117487))
    p = multiply_add(p, v, _f(0.032080736))
    p = multiply_add(p, v, _f(-0.038786747))
    p = multiply_add(p, v, _f(0.047737032))
    p = multiply_add(p, v, _f(-0.06417249))
    p = multiply_add(p, v, _f(0.12855193))
    p = multiply_add(p, x, _HALF)
    p = _f(0) if x < _f(-5.5) else p
    return x * (_ONE if x > _f(5.5) else p)


@njit(forceinline=True)
def gelu_slope(x):  # type: ignore[no-untyped-def]
    """The derivative Φ(x) + x φ(x) of `gelu`, in the same form up to ±5.6 (absolute error 4e-7)."""
    v = multiply_add(x * x, _f(0.06377551), -_ONE)
    p = multiply_add(_f(0.0031837106), v, _f(-0.008023718))
    p = multiply_add(p, v, _f(0.00413992))
    p = multiply_add(p, v, _f(-0.0025250495))
    p = multiply_add(p, v, _f(0.020465732))
    p = multiply_add(p, v, _f(-0.038244955))
    p = multiply_add(p, v, _f(0.042645052))
    p = multiply_add(p, v, _f(-0.051604833))
    p = multiply_add(p, v, _f(0.0666104))
    p = multiply_add(p, v, _f(-0.07376563))
    p = multiply_add(p, v, _f(0.071630985))
    p = multiply_add(p, v, _f(-0.06488021))
    p = multiply_add(p, v, _f(0.05668461))
    p = multiply_add(p, v, _f(-0.05097255))
    p = multiply_add(p, v, _f(0.051807974))
    p = multiply_add(p, v, _f(-0.064282306))
    p = multiply_add(p, v, _f(0.12641664))
    p = multiply_add(p, x, _HALF)
    p = _f(0) if x < _f(-5.6) else p
    return _ONE if x > _f(5.6) else p


@njit(forceinline=True)
def erfc_scaled(z):  # type: ignore[no-untyped-def]
    """exp(z²) erfc(z) for z ≥ 0, as a polynomial in 1/(1 + 0.4 z). Error of the polynomial: 3e-8 up to z = 10."""
    t = _ONE / multiply_add(_f(0.4), z, _ONE)
    p = multiply_add(_f(0.0286957454), t, _f(-0.0747488737))
    p = multiply_add(p, t, _f(-0.0636867136))
    p = multiply_add(p, t, _f(0.275788993))
    p = multiply_add(p, t, _f(-0.0685675144))
    p = multiply_add(p, t, _f(0.268638074))
    p = multiply_add(p, t, _f(0.177416191))
    p = multiply_add(p, t, _f(0.231355175))
    p = multiply_add(p, t, _f(0.225082576))
    return multiply_add(p, t, _f(2.64053124e-05))


@njit(forceinline=True)
def erf(x):  # type: ignore[no-untyped-def]
    """erf x: an odd polynomial up to 1 (error 1.2e-9), 1 - erfc beyond."""
    z = abs(x)
    u = x * x
    p = multiply_add(_f(7.85385419e-05), u, _f(-0.000801019138))
    p = multiply_add(p, u, _f(0.00518832728))
    p = multiply_add(p, u, _f(-0.026853811))
    p = multiply_add(p, u, _f(0.112835854))
    p = multiply_add(p, u, _f(-0.37612626))
    p = multiply_add(p, u, _f(0.128379167))
    tail = _ONE - exp_within(-u) * erfc_scaled(z)
    return multiply_add(p, x, x) if z < _ONE else (tail if x > _f(0) else -tail)


@njit(forceinline=True)
def log(x):  # type: ignore[no-untyped-def]
    """ln x, from the exponent and a polynomial in f = mantissa - 1 over [√½, √2). Error of the polynomial: 6e-9."""
    tiny = x < _MIN_NORMAL
    bits = np.int32(to_bits(x * _f(8388608) if tiny else x) - _SQRT_HALF_BITS)
    e = _f(bits >> 23) - (_f(23) if tiny else _f(0))
    f = from_bits(np.int32((bits & 0x7FFFFF) + _SQRT_HALF_BITS)) - _ONE
    p = multiply_add(_f(-0.0763442963), f, _f(0.127615497))
    p = multiply_add(p, f, _f(-0.131601945))
    p = multiply_add(p, f, _f(0.142017618))
    p = multiply_add(p, f, _f(-0.166233569))
    p = multiply_add(p, f, _f(0.200012267))
    p = multiply_add(p, f, _f(-0.250008225))
    p = multiply_add(p, f, _f(0.333333313))
    square = f * f
    y = multiply_add(e, _LN2_LOW, multiply_add(square * f, p, -_HALF * square))
    y = multiply_add(e, _LN2_HIGH, f + y)
    y = y if x > _f(0) else (-_INF if x == _f(0) else _NAN)
    return y if x < _INF else x  # +inf and NaN
