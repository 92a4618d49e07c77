"""Normalisations and softmax as the CUDA kernels of csrc/group_norm.cu, layer_norm.cu and softmax.cu.

A kernel takes float32 or float64, never a mixture; what it can't take (no elements, an axis other than the last) its op's
definition computes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tinydiff.backend import Array, array_module
from tinydiff.kernels import cuda
from tinydiff.kernels.convrule import ACTIVATIONS

LARGEST_BATCH = 65535  # blocks along a grid's last axis


def _parameters(x: Array, *parameters: Array | None) -> bool:
    """Whether each, where there is one, has an entry for each channel of x: what the compositions insist on."""
    return all(p is None or p.shape == x.shape[-1:] for p in parameters)


def _workspace(name: str, like: Array, size: Sequence[int]) -> Array:
    floats = getattr(cuda.launchers(like), name)(*size) // 4
    return cuda.allocate(array_module(like), f"the {name.replace('_', ' ')}", (floats,), "float32")


def group_norm(x: Array, weight: Any, bias: Any, *, num_groups: int, eps: float, activation: str | None) -> Any:
    """The result, and mean and 1/std (N, num_groups), which the backward reads. See `ops.group_norm`."""
    given = cuda.taken(x=x, weight=weight, bias=bias)
    if given is None or x.ndim < 2 or num_groups < 1 or x.shape[-1] % num_groups or activation not in ACTIVATIONS:
        return NotImplemented
    if not _parameters(x, weight, bias) or x.shape[0] > LARGEST_BATCH:
        return NotImplemented
    x, weight, bias = given
    size = _group_norm_size(x, num_groups)
    arrays = {
        "x": x,
        "weight": weight,
        "bias": bias,
        "y": cuda.empty_like(x, "y", *x.shape),
        "mean": cuda.empty_like(x, "mean", x.shape[0], num_groups),
        "rstd": cuda.empty_like(x, "rstd", x.shape[0], num_groups),
        "workspace": _workspace("group_norm_workspace", x, size),
    }
    cuda.launch("group_norm", [*size, eps, ACTIVATIONS.index(activation)], arrays, ["y", "mean", "rstd", "workspace"])
    return arrays["y"], (arrays["mean"], arrays["rstd"])


def group_norm_backward(
    g: Array, x: Array, weight: Any, bias: Any, mean: Array, rstd: Array, *, num_groups: int, activation: str | None
) -> Any:
    """The gradients of x, weight and bias (None where there is no such parameter)."""
    given = cuda.taken(g=g, x=x, weight=weight, bias=bias)
    if given is None:
        return NotImplemented
    g, x, weight, bias = given
    size = _group_norm_size(x, num_groups)
    arrays = {
        "g": g,
        "x": x,
        "weight": weight,
        "bias": bias,
        "mean": mean,
        "rstd": rstd,
        "gx": cuda.empty_like(x, "gx", *x.shape),
        "gweight": None if weight is None else cuda.empty_like(x, "gweight", *weight.shape),
        "gbias": None if bias is None else cuda.empty_like(x, "gbias", *bias.shape),
        "workspace": _workspace("group_norm_workspace", x, size),
    }
    written = ["gx", "gweight", "gbias", "workspace"]
    cuda.launch("group_norm_backward", [*size, ACTIVATIONS.index(activation)], arrays, written)
    return arrays["gx"], arrays["gweight"], arrays["gbias"]


def _group_norm_size(x: Array, num_groups: int) -> list[int]:
    return [cuda.exactly(x), x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1], num_groups]


def layer_norm(x: Array, weight: Any, bias: Any, *, eps: float) -> Any:
    """The result, and mean and 1/std of each row, which the backward reads. See `ops.layer_norm`."""
    given = cuda.taken(x=x, weight=weight, bias=bias)
    if given is None or x.ndim < 1 or not _parameters(x, weight, bias):
        return NotImplemented
    x, weight, bias = given
    size = _rows(x)
    arrays = {"x": x, "weight": weight, "bias": bias, "y": cuda.empty_like(x, "y", *x.shape)}
    arrays |= {name: cuda.empty_like(x, name, size[1]) for name in ("mean", "rstd")}
    cuda.launch("layer_norm", [*size, eps], arrays, ["y", "mean", "rstd"])
    return arrays["y"], (arrays["mean"], arrays["rstd"])


def layer_norm_backward(g: Array, x: Array, weight: Any, bias: Any, mean: Array, rstd: Array) -> Any:
    """The gradients of x, weight and bias (None where there is no such parameter)."""
    given = cuda.taken(g=g, x=x, weight=weight)
    if given is None:
        return NotImplemented
    g, x, weight = given
    size = _rows(x)
    arrays = {"g": g, "x": x, "weight": weight, "mean": mean, "rstd": rstd, "gx": cuda.empty_like(x, "gx", *x.shape)}
    arrays["gweight"] = None if weight is None else cuda.empty_like(x, "gweight", *weight.shape)
    arrays["gbias"] = None if bias is None else cuda.empty_like(x, "gbias", *bias.shape)
    arrays["workspace"] = _workspace("layer_norm_workspace", x, size)
    cuda.launch("layer_norm_backward", size, arrays, ["gx", "gweight", "gbias", "workspace"])
    return arrays["gx"], arrays["gweight"], arrays["gbias"]


def softmax(x: Array, *, axis: int, logarithmic: bool = False) -> Any:
    """See `ops.softmax` and `ops.log_softmax`; the last axis only."""
    given = cuda.taken(x=x)
    if given is None or axis not in (-1, x.ndim - 1):
        return NotImplemented
    arrays = {"x": given[0], "y": cuda.empty_like(x, "y", *x.shape)}
    cuda.launch("softmax", [*_rows(x), logarithmic], arrays, ["y"])
    return arrays["y"]


def softmax_backward(g: Array, out: Array, *, axis: int, logarithmic: bool = False) -> Any:
    """The gradient of x, from that of the result and the result."""
    given = cuda.taken(g=g, out=out)
    if given is None or axis not in (-1, out.ndim - 1):
        return NotImplemented
    arrays = {"g": given[0], "y": given[1], "gx": cuda.empty_like(out, "gx", *out.shape)}
    cuda.launch("softmax_backward", [*_rows(out), logarithmic], arrays, ["gx"])
    return arrays["gx"]


def _rows(x: Array) -> list[int]:
    return [cuda.exactly(x), math.prod(x.shape[:-1]), x.shape[-1]]
