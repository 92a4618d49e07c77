"""The transformer that lets a picture's pixels look at each other and at a text: names and arithmetic of Transformer2DModel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tinydiff import ops
from tinydiff.nn import Attention, Conv2d, GroupNorm, LayerNorm, Linear, Module, ModuleList
from tinydiff.tensor import Tensor

EPS = 1e-6  # of the group norm, whatever the network's other norms have


class GEGLU(Module):
    """h · gelu(gate), both linear in x (Shazeer 2020, "GLU variants improve transformer"): holds the weights, for `ops.mlp`."""

    def __init__(self, in_features: int, out_features: int) -> None:
        self.proj = Linear(in_features, 2 * out_features)


class FeedForward(Module):
    """GEGLU to four times the width, and a linear layer back. The published models have an inactive dropout between."""

    def __init__(self, width: int) -> None:
        self.net: ModuleList[Any] = ModuleList([GEGLU(width, 4 * width), Module(), Linear(4 * width, width)])

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """(…, width) to the same, added to the residual."""
        first, last = self.net[0].proj, self.net[2]
        return ops.mlp(x, first.weight, first.bias, last.weight, last.bias, residual, "geglu")


class BasicTransformerBlock(Module):
    """Self-attention, attention to the context, feed-forward; each behind a layer norm and added to its input.

    Attributes:
        observer: if set, is shown (attention, x, context) of each attention to the context.
    """

    observer: Callable[[Attention, Tensor, Tensor], None] | None = None

    def __init__(self, width: int, heads: int, context_dim: int) -> None:
        self.norm1 = LayerNorm(width)
        self.attn1 = Attention(width, heads, width // heads)
        self.norm2 = LayerNorm(width)
        self.attn2 = Attention(width, heads, width // heads, context_dim)
        self.norm3 = LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x (N, L, width) and context (N, S, context_dim) to (N, L, width)."""
        x = self.attn1(self.norm1(x), residual=x)
        y = self.norm2(x)
        if self.observer is not None:
            self.observer(self.attn2, y, context)
        x = self.attn2(y, context, residual=x)
        return self.ff(self.norm3(x), x)


class Transformer2DModel(Module):
    """Group norm, a projection of every pixel, transformer blocks over all pixels, a projection back, + input.

    Args:
        linear: the projections are stored as linear layers, not as 1×1 convolutions.
    Raises ValueError if heads don't divide the width.
    """

    def __init__(self, width: int, heads: int, depth: int, context_dim: int, groups: int, linear: bool = False) -> None:
        if heads < 1 or width % heads:
            raise ValueError(f"Transformer2DModel: {heads} heads must divide the width {width}")
        self.norm = GroupNorm(groups, width, EPS)
        self.proj_in: Module = Linear(width, width) if linear else Conv2d(width, width, 1)
        self.transformer_blocks = ModuleList(BasicTransformerBlock(width, heads, context_dim) for _ in range(depth))
        self.proj_out: Module = Linear(width, width) if linear else Conv2d(width, width, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x (N, H, W, width) and context (N, S, context_dim) to (N, H, W, width)."""
        n, h, w, c = x.shape
        y = ops.reshape(self.proj_in(self.norm(x)), (n, h * w, c))
        for block in self.transformer_blocks:
            y = block(y, context)
        return self.proj_out(ops.reshape(y, x.shape), x)
