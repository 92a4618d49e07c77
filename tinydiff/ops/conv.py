"""Convolution and pooling, channels last.

Convolution is one trilinear form ⟨gy, conv(x, w)⟩ = ⟨x, input_grad(gy, w)⟩ = ⟨w, weight_grad(x, gy)⟩. Its three partial
derivatives are the three ops here; the gradient of each is made of the other two, so three kernels give every order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np

from tinydiff import kernels
from tinydiff.autograd import enable_grad, grad, is_grad_enabled
from tinydiff.backend import Array
from tinydiff.op import fused, op
from tinydiff.ops.activation import relu, silu
from tinydiff.ops.indexing import upsample_nearest2d
from tinydiff.ops.reduce import max, mean, sum
from tinydiff.ops.shape import getitem, stack
from tinydiff.tensor import Tensor, as_tensor

Pair = tuple[int, int]
Padding = tuple[Pair, Pair]


def pair(name: str, value: Any, least: int = 1) -> Pair:
    """A number or two as two. Raises ValueError below `least`."""
    return _pair(name, value if isinstance(value, int | np.integer) else tuple(value), least)


@lru_cache(256)
def _pair(name: str, value: Any, least: int) -> Pair:
    found = value if isinstance(value, tuple) else (value, value)
    if len(found) != 2 or not all(isinstance(v, int | np.integer) and v >= least for v in found):
        raise ValueError(f"{name} must be one integer or two, at least {least}, not {value!r}")
    return int(found[0]), int(found[1])


def padding_pairs(padding: Any) -> Padding:
    """Padding as ((top, bottom), (left, right)), from a number, (height, width) or that. Raises ValueError below 0."""
    if not isinstance(padding, int | np.integer) and len(padding) == 2 and not isinstance(padding[0], int | np.integer):
        return pair("padding", padding[0], 0), pair("padding", padding[1], 0)
    height, width = pair("padding", padding, 0)
    return (height, height), (width, width)


@lru_cache(256)
def output_size(size: Pair, kernel: Pair, stride: Pair, padding: Padding) -> Pair:
    """Height and width of a convolution's result. Raises ValueError when the kernel is larger than the padded input."""
    padded = tuple(n + a + b for n, (a, b) in zip(size, padding))
    if any(n < k for n, k in zip(padded, kernel)):
        raise ValueError(f"a kernel of {kernel[0]}×{kernel[1]} is larger than the padded input {padded[0]}×{padded[1]}; pad more")
    return tuple((n - k) // s + 1 for n, k, s in zip(padded, kernel, stride))  # type: ignore[return-value]


def _taps(kernel: Pair, out: Pair, stride: Pair) -> Iterator[tuple[int, int, Any]]:
    """For each position in the kernel, the index of the padded input's pixels under it."""
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            rows = slice(i, i + stride[0] * (out[0] - 1) + 1, stride[0])
            columns = slice(j, j + stride[1] * (out[1] - 1) + 1, stride[1])
            yield i, j, (slice(None), rows, columns)


@op(name="conv2d", flops=lambda out, x, w, *rest, **params: 2 * out.size * w.shape[0] * w.shape[1] * w.shape[2])
def _conv2d(
    xp: Any, x: Array, w: Array, bias: Array | None = None, residual: Array | None = None, *, stride: Pair, padding: Padding
) -> Array:
    out = output_size(x.shape[1:3], w.shape[:2], stride, padding)
    padded = xp.pad(x, ((0, 0), *padding, (0, 0)))
    result = xp.zeros((x.shape[0], *out, w.shape[3]), x.dtype)
    for i, j, window in _taps(w.shape[:2], out, stride):
        result += padded[window] @ w[i, j]
    if bias is not None:
        result += bias if bias.ndim == 1 else bias[:, None, None, :]
    if residual is not None:
        result += residual
    return result


@op(name="conv2d_input_grad", flops=lambda out, gy, w, **params: 2 * gy.size * w.shape[0] * w.shape[1] * w.shape[2])
def _conv2d_input_grad(xp: Any, gy: Array, w: Array, *, input_size: Pair, stride: Pair, padding: Padding) -> Array:
    (top, bottom), (left, right) = padding
    height, width = input_size
    padded = xp.zeros((gy.shape[0], height + top + bottom, width + left + right, w.shape[2]), gy.dtype)
    for i, j, window in _taps(w.shape[:2], gy.shape[1:3], stride):
        padded[window] += gy @ w[i, j].T
    return padded[:, top : top + height, left : left + width]


@op(name="conv2d_weight_grad", flops=lambda out, x, gy, **params: 2 * gy.size * out.shape[0] * out.shape[1] * out.shape[2])
def _conv2d_weight_grad(xp: Any, x: Array, gy: Array, *, kernel_size: Pair, stride: Pair, padding: Padding) -> Array:
    padded = xp.pad(x, ((0, 0), *padding, (0, 0)))
    result = xp.empty((*kernel_size, x.shape[3], gy.shape[3]), x.dtype)
    pixels = math.prod(gy.shape[:3])
    for i, j, window in _taps(kernel_size, gy.shape[1:3], stride):
        result[i, j] = padded[window].reshape(pixels, x.shape[3]).T @ gy.reshape(pixels, gy.shape[3])
    return result


@_conv2d.vjp("x")
def _(g: Tensor, w: Tensor, shapes: Any, stride: Pair, padding: Padding) -> Tensor:
    return _conv2d_input_grad(g, w, input_size=shapes[0][1:3], stride=stride, padding=padding)


@_conv2d.vjp("w")
def _(g: Tensor, x: Tensor, shapes: Any, stride: Pair, padding: Padding) -> Tensor:
    return _conv2d_weight_grad(x, g, kernel_size=shapes[1][:2], stride=stride, padding=padding)


@_conv2d.vjp("bias")
def _(g: Tensor, shapes: Any) -> Tensor:
    return sum(g, axis=(0, 1, 2) if len(shapes[2]) == 1 else (1, 2))


@_conv2d.vjp("residual")
def _(g: Tensor) -> Tensor:
    return g


@_conv2d_input_grad.vjp("gy")
def _(g: Tensor, w: Tensor, stride: Pair, padding: Padding) -> Tensor:
    return _conv2d(g, w, stride=stride, padding=padding)


@_conv2d_input_grad.vjp("w")
def _(g: Tensor, gy: Tensor, shapes: Any, stride: Pair, padding: Padding) -> Tensor:
    return _conv2d_weight_grad(g, gy, kernel_size=shapes[1][:2], stride=stride, padding=padding)


@_conv2d_weight_grad.vjp("x")
def _(g: Tensor, gy: Tensor, shapes: Any, stride: Pair, padding: Padding) -> Tensor:
    return _conv2d_input_grad(gy, g, input_size=shapes[0][1:3], stride=stride, padding=padding)


@_conv2d_weight_grad.vjp("gy")
def _(g: Tensor, x: Tensor, stride: Pair, padding: Padding) -> Tensor:
    return _conv2d(x, g, stride=stride, padding=padding)


@_conv2d.kernel("numpy")
def _(x: Array, w: Array, bias: Any, residual: Any, stride: Pair, padding: Padding) -> Any:
    if x.dtype != np.float32:
        return NotImplemented
    return kernels.conv.conv2d(x, w, bias, residual, stride=stride, padding=padding)


@_conv2d.kernel_backward("numpy", "x")
def _(g: Array, w: Array, shapes: Any, gathered: Any, stride: Pair, padding: Padding) -> Any:
    if g.dtype != np.float32:
        return NotImplemented
    return kernels.conv.conv2d_input_grad(g, w, gathered, input_size=shapes[0][1:3], stride=stride, padding=padding)


@_conv2d.kernel_backward("numpy", "w", "bias")
def _(g: Array, x: Array, shapes: Any, needs: Any, stride: Pair, padding: Padding) -> Any:
    if g.dtype != np.float32 or not g.size or not x.size:
        return NotImplemented
    gw = sums = gbias = None
    if needs[1]:
        gw = kernels.conv.conv2d_weight_grad(x, g, kernel_size=shapes[1][:2], stride=stride, padding=padding, sums=needs[2])
        gw, sums = gw if needs[2] else (gw, None)
    if needs[2]:
        rows = np.ascontiguousarray(g).reshape(len(g), -1, g.shape[3]) if sums is None else sums[:, None]
        gbias = kernels.sums.sum_rows(rows.reshape(1, -1, g.shape[3]) if len(shapes[2]) == 1 else rows).reshape(shapes[2])
    return gw, gbias


@_conv2d.kernel_backward("numpy", "residual")
def _(g: Array) -> Any:
    return g


@_conv2d_input_grad.kernel("numpy")
def _(gy: Array, w: Array, input_size: Pair, stride: Pair, padding: Padding) -> Any:
    if gy.dtype != np.float32:
        return NotImplemented
    return kernels.conv.conv2d_input_grad(gy, w, input_size=input_size, stride=stride, padding=padding)


@_conv2d_weight_grad.kernel("numpy")
def _(x: Array, gy: Array, kernel_size: Pair, stride: Pair, padding: Padding) -> Any:
    if x.dtype != np.float32:
        return NotImplemented
    return kernels.conv.conv2d_weight_grad(x, gy, kernel_size=kernel_size, stride=stride, padding=padding)


@_conv2d.kernel("cuda")
def _(x: Array, w: Array, bias: Any, residual: Any, stride: Pair, padding: Padding) -> Any:
    return kernels.cuda.conv2d(x, w, bias, residual, stride=stride, padding=padding)


@_conv2d_input_grad.kernel("cuda")
def _(gy: Array, w: Array, input_size: Pair, stride: Pair, padding: Padding) -> Any:
    return kernels.cuda.conv2d_input_grad(gy, w, input_size=input_size, stride=stride, padding=padding)


@_conv2d_weight_grad.kernel("cuda")
def _(x: Array, gy: Array, kernel_size: Pair, stride: Pair, padding: Padding) -> Any:
    return kernels.cuda.conv2d_weight_grad(x, gy, kernel_size=kernel_size, stride=stride, padding=padding)


@fused(name="conv2d_activation", flops=lambda out, x, w, *rest, **params: 2 * out.size * w.shape[0] * w.shape[1] * w.shape[2])
def _conv2d_activation(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: Pair,
    padding: Padding,
    activation: str,
) -> Tensor:
    """The convolution and its activation as one op, for devices whose kernel applies it before the result is stored."""
    return activate(_conv2d(x, w, bias, residual, stride=stride, padding=padding), activation)


@_conv2d_activation.kernel("cuda")
def _(x: Array, w: Array, bias: Any, residual: Any, stride: Pair, padding: Padding, activation: str) -> Any:
    keep = is_grad_enabled() and activation == "silu"  # its gradient can't be told from its result; ReLU's can
    found = kernels.cuda.conv2d(x, w, bias, residual, stride=stride, padding=padding, activation=activation, keep=keep)
    return found if keep or found is NotImplemented else (found, found)


@_conv2d_activation.kernel_backward("cuda")
def _(
    g: Array, x: Array, w: Array, shapes: Any, cache: Array, needs: Any, stride: Pair, padding: Padding, activation: str
) -> Any:
    g = activation_gradient(g, cache, activation)
    gx = gw = gbias = None
    if needs[0]:
        gx = kernels.cuda.conv2d_input_grad(g, w, input_size=x.shape[1:3], stride=stride, padding=padding)
    if needs[1]:
        gw = kernels.cuda.conv2d_weight_grad(x, g, kernel_size=w.shape[:2], stride=stride, padding=padding)
    if needs[2]:
        gbias = g.sum(axis=(0, 1, 2) if len(shapes[2]) == 1 else (1, 2))
    if gx is NotImplemented or gw is NotImplemented:
        return NotImplemented
    return gx, gw, gbias, g


def activation_gradient(g: Array, x: Array, activation: str) -> Array:
    """The gradient by x of the named activation, given that by its result. For ReLU x may be the result."""
    t = Tensor(x, True)
    with enable_grad():
        return grad(activate(t, activation), [t], Tensor(g))[0].data


def _check_image(name: str, what: str, x: Any) -> None:
    if x.ndim != 4:
        raise ValueError(f"{name}: {what} must be (N, H, W, C), not of shape {x.shape}")


def conv2d(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Cross-correlation of images with filters, as deep learning's "convolution".

    Args:
        x: (N, H, W, C). w: (KH, KW, C, O). bias: (O,), or (N, O) for one per sample.
        stride: a number or (vertical, horizontal).
        padding: zeros around: a number, (vertical, horizontal), or ((top, bottom), (left, right)).
        residual: (N, Ho, Wo, O), added to the result. activation: "silu" or "relu", applied last.

    Returns (N, Ho, Wo, O) with Ho = (H + top + bottom - KH) // stride + 1. Raises ValueError for sizes that don't fit.
    """
    x, w = as_tensor(x), as_tensor(w)
    _check_image("conv2d", "x", x)
    if w.ndim != 4 or w.shape[2] != x.shape[3]:
        raise ValueError(f"conv2d: x has {x.shape[3]} channels, so w must be (KH, KW, {x.shape[3]}, O), not {w.shape}")
    if bias is not None and bias.shape not in ((w.shape[3],), (x.shape[0], w.shape[3])):
        raise ValueError(f"conv2d: bias must be ({w.shape[3]},) or ({x.shape[0]}, {w.shape[3]}), not {bias.shape}")
    stride, padding = pair("stride", stride), padding_pairs(padding)
    expected = (x.shape[0], *output_size(x.shape[1:3], w.shape[:2], stride, padding), w.shape[3])
    if residual is not None and residual.shape != expected:
        raise ValueError(f"conv2d: residual must have the result's shape {expected}, not {residual.shape}")
    if activation is None:
        return _conv2d(x, w, bias, residual, stride=stride, padding=padding)
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; use one of {', '.join(ACTIVATIONS)} or None")
    return _conv2d_activation(x, w, bias, residual, stride=stride, padding=padding, activation=activation)


def activate(x: Tensor, activation: str | None) -> Tensor:
    """The named activation of x, or x itself for None. Raises ValueError for an unknown name."""
    if activation is None:
        return x
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; use one of {', '.join(ACTIVATIONS)} or None")
    return ACTIVATIONS[activation](x)


ACTIVATIONS = {"silu": silu, "relu": relu}


def conv2d_input_grad(gy: Tensor, w: Tensor, input_size: Any, stride: Any = 1, padding: Any = 0) -> Tensor:
    """The gradient of conv2d by its input (a transposed convolution).

    gy (N, Ho, Wo, O) and w (KH, KW, C, O) give (N, *input_size, C). Raises ValueError for sizes that don't fit.
    """
    gy, w = as_tensor(gy), as_tensor(w)
    _check_image("conv2d_input_grad", "gy", gy)
    stride, padding, size = pair("stride", stride), padding_pairs(padding), pair("input_size", input_size)
    expected = output_size(size, w.shape[:2], stride, padding)
    if gy.shape[1:] != (*expected, w.shape[3]):
        raise ValueError(f"conv2d_input_grad: gy must be (N, {expected[0]}, {expected[1]}, {w.shape[3]}), not {gy.shape}")
    return _conv2d_input_grad(gy, w, input_size=size, stride=stride, padding=padding)


def conv2d_weight_grad(x: Tensor, gy: Tensor, kernel_size: Any, stride: Any = 1, padding: Any = 0) -> Tensor:
    """The gradient of conv2d by its weight.

    x (N, H, W, C) and gy (N, Ho, Wo, O) give (*kernel_size, C, O). Raises ValueError for sizes that don't fit.
    """
    x, gy = as_tensor(x), as_tensor(gy)
    _check_image("conv2d_weight_grad", "x", x)
    stride, padding, size = pair("stride", stride), padding_pairs(padding), pair("kernel_size", kernel_size)
    expected = output_size(x.shape[1:3], size, stride, padding)
    if gy.ndim != 4 or gy.shape[:3] != (x.shape[0], *expected):
        raise ValueError(f"conv2d_weight_grad: gy must be ({x.shape[0]}, {expected[0]}, {expected[1]}, O), not {gy.shape}")
    return _conv2d_weight_grad(x, gy, kernel_size=size, stride=stride, padding=padding)


@fused(name="upsample_conv2d", flops=lambda out, x, w, *rest: 2 * out.size * w.shape[0] * w.shape[1] * w.shape[2])
def _upsample_conv2d(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    return _conv2d(upsample_nearest2d(x), w, bias, stride=(1, 1), padding=((1, 1), (1, 1)))


@_upsample_conv2d.kernel("numpy")
def _(x: Array, w: Array, bias: Any) -> Any:
    return kernels.conv.upsample_conv2d(x, w, bias) if x.dtype == np.float32 else NotImplemented


@_upsample_conv2d.kernel_backward("numpy", "x")
def _(g: Array, w: Array, gathered: Any) -> Any:
    return kernels.conv.upsample_conv2d_input_grad(g, w, gathered)


@_upsample_conv2d.kernel_backward("numpy", "w", "bias")
def _(g: Array, x: Array, needs: Any) -> Any:
    gw, sums = kernels.conv.upsample_conv2d_weight_grad(x, g, sums=needs[2])
    return gw, None if sums is None else sums.sum(0)


def upsample_conv2d(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """`upsample_nearest2d`, then `conv2d` with a padding of 1; on the CPU in one, with fewer products than the latter takes.

    x (N, H, W, C), w (3, 3, C, O) and bias (O,) give (N, 2H, 2W, O). Raises ValueError for other sizes.
    """
    x, w = as_tensor(x), as_tensor(w)
    _check_image("upsample_conv2d", "x", x)
    if w.ndim != 4 or w.shape[:3] != (3, 3, x.shape[3]):
        raise ValueError(f"upsample_conv2d: x has {x.shape[3]} channels, so w must be (3, 3, {x.shape[3]}, O), not {w.shape}")
    if bias is not None and bias.shape != (w.shape[3],):
        raise ValueError(f"upsample_conv2d: bias must be ({w.shape[3]},), not {bias.shape}")
    return _upsample_conv2d(x, w, bias)


def _windows(name: str, x: Tensor, kernel_size: Any, stride: Any) -> tuple[Pair, Pair, Pair]:
    _check_image(name, "x", x)
    kernel = pair("kernel_size", kernel_size)
    stride = kernel if stride is None else pair("stride", stride)
    return kernel, stride, output_size(x.shape[1:3], kernel, stride, ((0, 0), (0, 0)))


def _pooled(name: str, x: Tensor, kernel_size: Any, stride: Any) -> Tensor:
    """The pixels under each tap, stacked: (taps, N, Ho, Wo, C)."""
    kernel, stride, out = _windows(name, x, kernel_size, stride)
    return stack([getitem(x, window) for _, _, window in _taps(kernel, out, stride)])


@fused
def max_pool2d(x: Tensor, kernel_size: Any, stride: Any = None) -> Tensor:
    """The largest value in each window of (N, H, W, C); `stride` defaults to the window. Equal ones share the gradient."""
    return max(_pooled("max_pool2d", x, kernel_size, stride), axis=0)


@fused
def avg_pool2d(x: Tensor, kernel_size: Any, stride: Any = None) -> Tensor:
    """The mean of each window of (N, H, W, C); `stride` defaults to the window."""
    return mean(_pooled("avg_pool2d", x, kernel_size, stride), axis=0)
