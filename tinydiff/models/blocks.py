"""The blocks that UNets and autoencoders are built of. Names and arithmetic follow the published Stable Diffusion models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tinydiff import ops
from tinydiff.nn import Attention, Conv2d, GroupNorm, Linear, Module, ModuleList
from tinydiff.tensor import Tensor


def timestep_embedding(t: Any, size: int, flip_sin_to_cos: bool = True, freq_shift: float = 0.0) -> Tensor:
    """Sines and cosines of t (N,) at geometrically falling frequencies (Vaswani et al. 2017): (N, size), float32.

    Frequency i of half = size/2 is exp(-ln(10000) · i / (half - freq_shift)).
    """
    half = size // 2
    frequencies = np.exp(-math.log(10000) * np.arange(half) / (half - freq_shift))
    angles = np.asarray(t, np.float64).reshape(-1, 1) * frequencies
    parts = (np.cos(angles), np.sin(angles)) if flip_sin_to_cos else (np.sin(angles), np.cos(angles))
    return Tensor(np.concatenate(parts, 1).astype(np.float32))


class TimestepEmbedding(Module):
    """Two linear layers with SiLU between, on a sinusoidal embedding."""

    def __init__(self, in_features: int, out_features: int) -> None:
        self.linear_1 = Linear(in_features, out_features)
        self.linear_2 = Linear(out_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in) to (N, out)."""
        return self.linear_2(ops.silu(self.linear_1(x)))


class ResnetBlock2D(Module):
    """norm, SiLU, conv (+ time), norm, SiLU, conv, + input (He et al. 2016 as in Ho et al. 2020).

    The time embedding enters as a bias of conv1 that differs by sample, and the input as a residual of conv2: neither
    costs a pass over memory.
    """

    def __init__(self, in_channels: int, out_channels: int, groups: int, eps: float, time_size: int | None = None) -> None:
        self.norm1 = GroupNorm(groups, in_channels, eps, "silu")
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = Linear(time_size, out_channels) if time_size else None
        self.norm2 = GroupNorm(groups, out_channels, eps, "silu")
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """x (N, H, W, in) and time (N, time_size), already through SiLU, to (N, H, W, out)."""
        shift = self.time_emb_proj(time) if self.time_emb_proj is not None else None
        h = self.conv1(self.norm1(x), shift=shift)
        return self.conv2(self.norm2(h), residual=x if self.conv_shortcut is None else self.conv_shortcut(x))


class SpatialAttention(Attention):
    """GroupNorm, then self-attention among all pixels, added to the input; projections with biases."""

    def __init__(self, channels: int, heads: int, head_dim: int, groups: int, eps: float) -> None:
        super().__init__(channels, heads, head_dim, bias=True)
        self.group_norm = GroupNorm(groups, channels, eps)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """(N, H, W, C) to the same."""
        n, h, w, c = x.shape
        y, rows = self.group_norm(x), (n, h * w, c)
        return ops.reshape(super().forward(ops.reshape(y, rows), residual=ops.reshape(x, rows)), x.shape)


class Downsample2D(Module):
    """A 3×3 convolution with stride 2. As in the published models, padding 0 means one row and column after the last."""

    def __init__(self, channels: int, padding: int = 1) -> None:
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=padding or ((0, 1), (0, 1)))

    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, C) to half the height and width."""
        return self.conv(x)


class Upsample2D(Module):
    """Each pixel four times, then a 3×3 convolution. An odd size that was halved is restored by cutting the surplus."""

    def __init__(self, channels: int) -> None:
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """(N, H, W, C) to (N, 2H, 2W, C), or to `size` if that is one less."""
        if size is None or size == (2 * x.shape[1], 2 * x.shape[2]):
            return ops.upsample_conv2d(x, self.conv.weight, self.conv.bias)
        return self.conv(ops.upsample_nearest2d(x)[:, : size[0], : size[1]])


class Block(Module):
    """Resnets, each with attention after it where the block has that, and a resampler where it has one."""

    attentions: ModuleList[Module] | None = None
    downsamplers: ModuleList[Downsample2D] | None = None
    upsamplers: ModuleList[Upsample2D] | None = None

    def __init__(self, resnets: list[ResnetBlock2D], attentions: Sequence[Module] = ()) -> None:
        self.resnets = ModuleList(resnets)
        if attentions:
            self.attentions = ModuleList(attentions)

    def layers(self) -> list[tuple[Module, Module | None]]:
        """Each resnet with its attention."""
        attentions = list(self.attentions) if self.attentions is not None else [None] * len(self.resnets)
        return list(zip(self.resnets, attentions))
