"""Layers: parameters with the op that uses them. Channels last; names of parameters as in PyTorch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tinydiff import ops
from tinydiff.nn import init
from tinydiff.nn.module import Module, Parameter, Sequential
from tinydiff.tensor import Tensor


class Linear(Module):
    """x @ weight + bias (+ residual) over the last axis; weight (in, out)."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        self.weight = Parameter(init.fan_in_uniform((in_features, out_features)), "linear")
        self.bias = Parameter(init.uniform((out_features,), 1 / math.sqrt(in_features))) if bias else None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(…, in) to (…, out); `residual`, of the result's shape, is added."""
        return ops.linear(x, self.weight, self.bias, residual)


class Conv2d(Module):
    """Convolution of (N, H, W, C); weight (KH, KW, C, O). `padding` as in `ops.conv2d`, one-sided too."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Any, stride: Any = 1, padding: Any = 0, bias: bool = True
    ) -> None:
        kernel = (kernel_size, kernel_size) if isinstance(kernel_size, int) else tuple(kernel_size)
        self.weight = Parameter(init.fan_in_uniform((*kernel, in_channels, out_channels)), "conv")
        self.bias = Parameter(init.uniform((out_channels,), 1 / math.sqrt(math.prod(kernel) * in_channels))) if bias else None
        self.stride, self.padding = stride, padding

    def forward(self, x: Tensor, residual: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """(N, H, W, C) to (N, Ho, Wo, O); `residual`, of the result's shape, and `shift` (N, O), one per sample, are added."""
        bias = self.bias if shift is None else shift if self.bias is None else shift + self.bias
        return ops.conv2d(x, self.weight, bias, self.stride, self.padding, residual)


class GroupNorm(Module):
    """`ops.group_norm` with a weight and bias per channel, and optionally the activation that follows."""

    def __init__(self, num_groups: int, num_channels: int, eps: float = 1e-5, activation: str | None = None) -> None:
        if num_groups < 1 or num_channels % num_groups:
            raise ValueError(f"GroupNorm: num_groups={num_groups} must divide num_channels={num_channels}")
        self.weight = Parameter(init.ones((num_channels,)))
        self.bias = Parameter(init.zeros((num_channels,)))
        self.num_groups, self.eps, self.activation = num_groups, eps, activation

    def forward(self, x: Tensor) -> Tensor:
        """(N, …, C) to the same."""
        return ops.group_norm(x, self.num_groups, self.weight, self.bias, self.eps, self.activation)


class LayerNorm(Module):
    """`ops.layer_norm` over the last axis with a weight and bias."""

    def __init__(self, size: int, eps: float = 1e-5) -> None:
        self.weight = Parameter(init.ones((size,)))
        self.bias = Parameter(init.zeros((size,)))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(…, size) to the same."""
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


class Embedding(Module):
    """A table of vectors, looked up by integers; weight (entries, size)."""

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        self.weight = Parameter(init.normal((num_embeddings, embedding_dim)))

    def forward(self, indices: Any) -> Tensor:
        """Integers of any shape to (*shape, size). Raises IndexError out of range."""
        return ops.embedding(indices, self.weight)


class Dropout(Module):
    """`ops.dropout` while training, nothing after `eval()`."""

    def __init__(self, p: float = 0.5) -> None:
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        return ops.dropout(x, self.p, training=self.training)


class Attention(Module):
    """Multi-head attention of (N, L, query_dim) to itself or to a context (N, S, context_dim).

    Names as in the published models: to_q, to_k, to_v, to_out.0; `to_out.0` always has a bias.
    """

    def __init__(self, query_dim: int, heads: int, head_dim: int, context_dim: int | None = None, bias: bool = False) -> None:
        inner = heads * head_dim
        self.to_q = Linear(query_dim, inner, bias)
        self.to_k = Linear(context_dim or query_dim, inner, bias)
        self.to_v = Linear(context_dim or query_dim, inner, bias)
        self.to_out = Sequential(Linear(inner, query_dim))
        self.heads, self.head_dim = heads, head_dim

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: np.ndarray | Tensor | None = None,
        is_causal: bool = False,
        residual: Tensor | None = None,
    ) -> Tensor:
        """(N, L, query_dim) to the same; `residual`, of that shape, is added.

        `mask` and `is_causal` as in `ops.scaled_dot_product_attention`.
        """
        source = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(source), self.to_v(source)
        return self.to_out[0](ops.scaled_dot_product_attention(q, k, v, mask, is_causal, heads=self.heads), residual)

    def weights(self, x: Tensor, context: Tensor) -> Tensor:
        """How much each of x (N, L, query_dim) looks at each of the context (N, S, …): (N, heads, L, S), adding up to 1 over S.

        `forward` never stores these; computing them here is for looking at them.
        """
        q, k = self._heads(self.to_q(x)), self._heads(self.to_k(context))
        return ops.softmax(ops.matmul(q, ops.transpose(k, -1, -2)) * self.head_dim**-0.5, -1)

    def _heads(self, projected: Tensor) -> Tensor:
        """(N, L, heads · head_dim) to (N, heads, L, head_dim)."""
        n, length = projected.shape[:2]
        return ops.permute(ops.reshape(projected, (n, length, self.heads, self.head_dim)), (0, 2, 1, 3))
