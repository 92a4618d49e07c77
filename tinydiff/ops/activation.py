"""Activations, and dropout."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tinydiff import kernels, random
from tinydiff.autograd import note_generator
from tinydiff.backend import Array, array_module
from tinydiff.op import LARGE, fused, op
from tinydiff.ops.elementwise import add, astype, erf, mul, sub
from tinydiff.ops.shape import split
from tinydiff.tensor import Tensor

SQRT_HALF = math.sqrt(0.5)
SMALL = 256  # elements from which one kernel is faster than the several calls of a composition or its derivative
BITS = 53  # of a random number, which are compared with dropout's probability
GELUS = {"none": "gelu", "tanh": "gelu_tanh"}  # kernels by approximation


@op
def tanh(xp: Any, x: Array) -> Array:
    """Hyperbolic tangent."""
    return xp.tanh(x)


@tanh.kernel("numpy", above=1 << 18)  # NumPy's is as fast on one thread
def _(x: Array) -> Any:
    return kernels.activation.tanh(x)


@tanh.vjp
def _(g: Tensor, out: Tensor) -> Tensor:
    return mul(g, sub(1.0, mul(out, out)))


@tanh.kernel("cuda", above=SMALL)
def _(x: Array) -> Any:
    return array_module(x).tanh(x)


@tanh.kernel_backward("cuda")
def _(g: Array, out: Array) -> Any:
    return kernels.gpu.run("tanh_backward", g, out)


def stable_sigmoid(xp: Any, x: Array) -> Array:
    """1/(1 + e⁻ˣ) as ½(1 + tanh(x/2)): no overflow on either side."""
    return 0.5 * (xp.tanh(0.5 * x) + 1)


@op
def sigmoid(xp: Any, x: Array) -> Array:
    """1/(1 + e⁻ˣ)."""
    return stable_sigmoid(xp, x)


@sigmoid.kernel("numpy", above=LARGE)
def _(x: Array) -> Any:
    return kernels.activation.sigmoid(x)


@sigmoid.vjp
def _(g: Tensor, out: Tensor) -> Tensor:
    return mul(g, mul(out, sub(1.0, out)))


@sigmoid.kernel("cuda", above=SMALL)
def _(x: Array) -> Any:
    return kernels.gpu.run("sigmoid", x)


@sigmoid.kernel_backward("cuda")
def _(g: Array, out: Array) -> Any:
    return kernels.gpu.run("sigmoid_backward", g, out)


@op
def relu(xp: Any, x: Array) -> Array:
    """max(x, 0). The derivative at 0 is 0."""
    return xp.maximum(x, 0)


@relu.vjp
def _(g: Tensor, x: Tensor) -> Tensor:
    return mul(g, astype(x > 0, g.dtype))


@relu.kernel("cuda", above=SMALL)
def _(x: Array) -> Any:
    return array_module(x).maximum(x, 0)


@relu.kernel_backward("cuda")
def _(g: Array, x: Array) -> Any:
    return kernels.gpu.run("relu_backward", g, x)


@op
def silu(xp: Any, x: Array) -> Array:
    """x · sigmoid(x), also called swish (Elfwing et al. 2017)."""
    return x * stable_sigmoid(xp, x)


@silu.vjp
def _(g: Tensor, x: Tensor) -> Tensor:
    s = sigmoid(x)
    return mul(g, mul(s, add(1.0, mul(x, sub(1.0, s)))))


@silu.kernel("numpy", above=SMALL)
def _(x: Array) -> Any:
    return kernels.activation.silu(x)


@silu.kernel_backward("numpy")
def _(g: Array, x: Array) -> Any:
    return kernels.activation.silu_backward(g, x)


@silu.kernel("cuda", above=SMALL)
def _(x: Array) -> Any:
    return kernels.gpu.run("silu", x)


@silu.kernel_backward("cuda")
def _(g: Array, x: Array) -> Any:
    return kernels.gpu.run("silu_backward", g, x)


@fused
def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """x · Φ(x), with the normal distribution's Φ by erf, or by tanh if `approximate="tanh"` (Hendrycks & Gimpel 2016)."""
    if approximate == "none":
        return x * (erf(x * SQRT_HALF) + 1.0) * 0.5
    if approximate == "tanh":
        return x * (tanh((x + x * x * x * 0.044715) * math.sqrt(2 / math.pi)) + 1.0) * 0.5
    raise ValueError(f"gelu: approximate must be 'none' or 'tanh', not {approximate!r}")


@gelu.kernel("numpy", above=SMALL)
def _(x: Array, approximate: str) -> Any:
    return kernels.activation.gelu(x, approximate)


@gelu.kernel_backward("numpy")
def _(g: Array, x: Array, approximate: str) -> Any:
    return kernels.activation.gelu_backward(g, x, approximate)


@gelu.kernel("cuda", above=SMALL)
def _(x: Array, approximate: str) -> Any:
    return kernels.gpu.run(GELUS[approximate], x) if approximate in GELUS else NotImplemented


@gelu.kernel_backward("cuda")
def _(g: Array, x: Array, approximate: str) -> Any:
    return kernels.gpu.run(f"{GELUS[approximate]}_backward", g, x)


@fused
def geglu(x: Tensor) -> Tensor:
    """x (…, 2C) to (…, C): the first half of the last axis times the exact GELU of the second (Shazeer 2020).

    Raises ValueError for a last axis of odd size.
    """
    if x.ndim == 0 or x.shape[-1] % 2:
        raise ValueError(f"geglu: the last axis must have an even size, to be cut in two; x has shape {x.shape}")
    value, gate = split(x, x.shape[-1] // 2, -1) if x.shape[-1] else (x, x)
    return mul(value, gelu(gate))


@geglu.kernel("numpy", above=SMALL)
def _(x: Array) -> Any:
    return kernels.activation.geglu(x)


@geglu.kernel_backward("numpy")
def _(g: Array, x: Array) -> Any:
    return kernels.activation.geglu_backward(g, x)


@geglu.kernel("cuda", above=SMALL)
def _(x: Array) -> Any:
    return kernels.gpu.geglu(x)


@geglu.kernel_backward("cuda")
def _(g: Array, x: Array) -> Any:
    return kernels.gpu.geglu_backward(g, x)


@fused
def quick_gelu(x: Tensor) -> Tensor:
    """x · sigmoid(1.702 x), the GELU of CLIP."""
    return x * sigmoid(x * 1.702)


@quick_gelu.kernel("numpy", above=SMALL)
def _(x: Array) -> Any:
    return kernels.activation.quick_gelu(x)


@quick_gelu.kernel_backward("numpy")
def _(g: Array, x: Array) -> Any:
    return kernels.activation.quick_gelu_backward(g, x)


@quick_gelu.kernel("cuda", above=SMALL)
def _(x: Array) -> Any:
    return kernels.gpu.run("quick_gelu", x)


@quick_gelu.kernel_backward("cuda")
def _(g: Array, x: Array) -> Any:
    return kernels.gpu.run("quick_gelu_backward", g, x)


@op
def softplus(xp: Any, x: Array) -> Array:
    """log(1 + eˣ), without overflow."""
    return xp.logaddexp(x, xp.zeros((), x.dtype))


@softplus.vjp
def _(g: Tensor, x: Tensor) -> Tensor:
    return mul(g, sigmoid(x))


def least_kept(p: float) -> int:
    """The least number of BITS bits that keeps its element."""
    return math.ceil(p * 2**BITS)


@op(name="drop")
def _drop(xp: Any, x: Array, p: float, seed: int) -> Array:
    """x with each element zeroed with probability p, as `seed` and its position decide, and the rest divided by 1 - p."""
    kept = (random.bits(xp, x.size, seed) >> np.uint64(64 - BITS) >= np.uint64(least_kept(p))).reshape(x.shape)
    return xp.where(kept, x * x.dtype.type(1 / (1 - p)), xp.zeros((), x.dtype))


@_drop.vjp
def _(g: Tensor, p: float, seed: int) -> Tensor:
    return _drop(g, p, seed)


@_drop.kernel("numpy", above=SMALL)
def _(x: Array, p: float, seed: int) -> Any:
    return kernels.dropout.drop(x, least_kept(p), 1 / (1 - p), seed)


@_drop.kernel("cuda")
def _(x: Array, p: float, seed: int) -> Any:
    return kernels.gpu.run("drop", x, seed, least_kept(p), 1 / (1 - p))


def dropout(x: Tensor, p: float = 0.5, training: bool = True, *, rng: np.random.Generator | None = None) -> Tensor:
    """x with each element zeroed with probability p and the rest divided by 1 - p (Srivastava et al. 2014).

    One seed is drawn from `rng`, by default the package's generator; the elements' numbers are computed from it where x is, the
    same on every device, and again backward. Raises ValueError unless 0 <= p < 1.
    """
    if not 0 <= p < 1:
        raise ValueError(f"dropout: p must be in [0, 1), not {p}")
    if not training or p == 0:
        return x
    if rng is not None:
        note_generator(rng)
    return _drop(x, float(p), random.draw_seed(rng))
