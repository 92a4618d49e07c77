"""The multilayer perceptron of transformers."""

from __future__ import annotations

from typing import Any

from tinydiff import kernels
from tinydiff.backend import Array
from tinydiff.names import choose
from tinydiff.op import LARGE, fused
from tinydiff.ops.activation import geglu, gelu, quick_gelu
from tinydiff.ops.linalg import linear
from tinydiff.tensor import Tensor

ACTIVATIONS = {"gelu": gelu, "quick_gelu": quick_gelu, "geglu": geglu}


def _flops(out: Array, x: Array, w1: Array, b1: Array, w2: Array, *rest: Any, **params: Any) -> float:
    return 2 * x.size // x.shape[-1] * (w1.size + w2.size)


@fused(flops=_flops)
def mlp(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    residual: Tensor | None = None,
    activation: str = "gelu",
) -> Tensor:
    """Two linear layers with an activation between, and added to the residual if there is one.

    x (…, C), weight1 (C, M), weight2 (M, O), or (M/2, O) where the activation is "geglu", biases (M,) and (O,), residual (…, O).
    activation: "gelu", "quick_gelu" or "geglu". Raises ValueError for another, and when sizes disagree.
    """
    activate = choose(ACTIVATIONS, activation, "mlp's activation")
    return linear(activate(linear(x, weight1, bias1)), weight2, bias2, residual)


@mlp.kernel("numpy", above=LARGE)
def _(x: Array, weight1: Array, bias1: Array, weight2: Array, bias2: Array, residual: Any, activation: str) -> Any:
    return kernels.mlp.mlp(x, weight1, bias1, weight2, bias2, residual, activation=activation)


@mlp.kernel_backward("numpy")
def _(g: Array, x: Array, weight1: Array, weight2: Array, residual: Any, cache: Any, activation: str) -> Any:
    found = kernels.mlp.mlp_backward(g, x, weight1, weight2, cache, activation=activation)
    return found if found is NotImplemented else (*found, None if residual is None else g)
