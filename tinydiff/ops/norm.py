"""Normalisation, fused with the activation that follows it."""

from __future__ import annotations

import math
from typing import Any

from tinydiff import kernels
from tinydiff.backend import Array
from tinydiff.op import fused
from tinydiff.ops.activation import SMALL
from tinydiff.ops.conv import activate
from tinydiff.ops.elementwise import add, mul, rsqrt, sub
from tinydiff.ops.reduce import mean
from tinydiff.ops.shape import reshape
from tinydiff.tensor import Tensor


def _standardise(x: Tensor, axes: Any, eps: float) -> Tensor:
    centred = sub(x, mean(x, axes, keepdims=True))
    return mul(centred, rsqrt(add(mean(mul(centred, centred), axes, keepdims=True), eps)))


def _scale_and_shift(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape != x.shape[-1:]:
            raise ValueError(f"norm: {name} must have shape {x.shape[-1:]} for x of shape {x.shape}, not {parameter.shape}")
    x = x if weight is None else mul(x, weight)
    return x if bias is None else add(x, bias)


@fused(flops=lambda out, *inputs, **params: 10 * out.size)
def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str | None = None,
) -> Tensor:
    """Each sample's groups of channels brought to mean 0 and variance 1, scaled and shifted (Wu & He 2018), then activated.

    x (N, …, C), weight and bias (C,). Raises ValueError unless `num_groups` divides C.
    """
    channels = x.shape[-1] if x.ndim else 0
    if x.ndim < 2 or num_groups < 1 or channels % num_groups:
        raise ValueError(
            f"group_norm: num_groups={num_groups} must divide the {channels} channels of x (N, …, C), shape {x.shape}"
        )
    grouped = reshape(x, (x.shape[0], math.prod(x.shape[1:-1]), num_groups, channels // num_groups))
    y = _scale_and_shift(reshape(_standardise(grouped, (1, 3), eps), x.shape), weight, bias)
    return activate(y, activation)


@group_norm.kernel("numpy", above=SMALL)
def _(x: Array, weight: Any, bias: Any, num_groups: int, eps: float, activation: str | None) -> Any:
    return kernels.norm.group_norm(x, weight, bias, num_groups=num_groups, eps=eps, activation=activation)


@group_norm.kernel_backward("numpy")
def _(g: Array, x: Array, weight: Any, bias: Any, cache: Any, gathered: Any, num_groups: int, activation: str | None) -> Any:
    return kernels.norm.group_norm_backward(g, x, weight, bias, *cache, gathered, num_groups=num_groups, activation=activation)


@group_norm.kernel("cuda")
def _(x: Array, weight: Any, bias: Any, num_groups: int, eps: float, activation: str | None) -> Any:
    return kernels.cuda_norm.group_norm(x, weight, bias, num_groups=num_groups, eps=eps, activation=activation)


@group_norm.kernel_backward("cuda")
def _(g: Array, x: Array, weight: Any, bias: Any, cache: Any, num_groups: int, activation: str | None) -> Any:
    return kernels.cuda_norm.group_norm_backward(g, x, weight, bias, *cache, num_groups=num_groups, activation=activation)


@fused(flops=lambda out, *inputs, **params: 8 * out.size)
def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """The last axis brought to mean 0 and variance 1, then scaled and shifted (Ba et al. 2016). weight and bias: (C,)."""
    return _scale_and_shift(_standardise(x, -1, eps), weight, bias)


@layer_norm.kernel("numpy", above=SMALL)
def _(x: Array, weight: Any, bias: Any, eps: float) -> Any:
    return kernels.norm.layer_norm(x, weight, bias, eps=eps)


@layer_norm.kernel_backward("numpy")
def _(g: Array, x: Array, weight: Any, bias: Any, cache: Any, eps: float) -> Any:
    return kernels.norm.layer_norm_backward(g, x, weight, bias, *cache, eps=eps)


@layer_norm.kernel("cuda")
def _(x: Array, weight: Any, bias: Any, eps: float) -> Any:
    return kernels.cuda_norm.layer_norm(x, weight, bias, eps=eps)


@layer_norm.kernel_backward("cuda")
def _(g: Array, x: Array, weight: Any, bias: Any, cache: Any) -> Any:
    return kernels.cuda_norm.layer_norm_backward(g, x, weight, bias, *cache)
