"""PyTorch twins of our networks: the same names and the same arithmetic, so that comparisons are of engines.

Channels first, as PyTorch has it; `load` carries our weights over and `channels_first`/`channels_last` the pictures.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from tinydiff import io
from tinydiff.models.autoencoder import EPS, AutoencoderKL
from tinydiff.models.classifier import Classifier
from tinydiff.models.model import Model
from tinydiff.models.transformer import EPS as TRANSFORMER_EPS
from tinydiff.models.unet import UNet2DModel
from tinydiff.models.unet_condition import UNet2DConditionModel


def channels_first(x: np.ndarray) -> torch.Tensor:
    """(N, H, W, C) copied to (N, C, H, W)."""
    return torch.from_numpy(np.moveaxis(x, -1, 1).copy())


def channels_last(x: torch.Tensor) -> np.ndarray:
    """(N, C, H, W) as (N, H, W, C)."""
    return x.detach().movedim(1, -1).numpy()


class TwinResnet(nn.Module):
    """`tinydiff.models.blocks.ResnetBlock2D`."""

    def __init__(self, in_channels: int, out_channels: int, groups: int, eps: float, time_size: int | None = None) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_size, out_channels) if time_size else None
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: torch.Tensor, time: torch.Tensor | None = None) -> torch.Tensor:
        """x (N, in, H, W) and time (N, time_size), already through SiLU, to (N, out, H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))
        if self.time_emb_proj is not None:
            h = h + self.time_emb_proj(time)[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class TwinAttention(nn.Module):
    """`tinydiff.models.blocks.SpatialAttention`."""

    def __init__(self, channels: int, heads: int, groups: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.group_norm = nn.GroupNorm(groups, channels, eps)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) to the same."""
        n, c, height, width = x.shape
        pixels = self.group_norm(x).reshape(n, c, height * width).transpose(1, 2)
        q, k, v = (
            project(pixels).reshape(n, -1, self.heads, c // self.heads).transpose(1, 2)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, -1, c)
        return x + self.to_out(attended).transpose(1, 2).reshape(x.shape)


class TwinHeads(nn.Module):
    """`tinydiff.nn.Attention` without biases but the last."""

    def __init__(self, width: int, heads: int, context_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k, self.to_v = (nn.Linear(context_dim, width, bias=False) for _ in range(2))
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """x (N, L, width) and context (N, S, context_dim) to (N, L, width)."""
        projected = (self.to_q(x), self.to_k(context), self.to_v(context))
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in projected)
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class TwinGEGLU(nn.Module):
    """`tinydiff.models.transformer.GEGLU`."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_features, 2 * out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, in) to (…, out)."""
        value, gate = self.proj(x).chunk(2, -1)
        return value * F.gelu(gate)


class TwinTransformerBlock(nn.Module):
    """`tinydiff.models.transformer.BasicTransformerBlock`."""

    def __init__(self, width: int, heads: int, context_dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.attn1, self.attn2 = TwinHeads(width, heads, width), TwinHeads(width, heads, context_dim)
        self.ff: Any = nn.Module()
        self.ff.net = nn.ModuleList([TwinGEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """x (N, L, width) and context (N, S, context_dim) to (N, L, width)."""
        y = self.norm1(x)
        x = x + self.attn1(y, y)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff.net[2](self.ff.net[0](self.norm3(x)))


class TwinTransformer(nn.Module):
    """`tinydiff.models.transformer.Transformer2DModel`."""

    def __init__(self, width: int, heads: int, depth: int, context_dim: int, groups: int, linear: bool) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, TRANSFORMER_EPS)
        self.proj_in: Any = nn.Linear(width, width) if linear else nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList(TwinTransformerBlock(width, heads, context_dim) for _ in range(depth))
        self.proj_out: Any = nn.Linear(width, width) if linear else nn.Conv2d(width, width, 1)
        self.linear = linear

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """x (N, C, H, W) and context (N, S, context_dim) to (N, C, H, W)."""
        height, width = x.shape[2:]
        y = self.norm(x)
        y = self.proj_in(y.flatten(2).transpose(1, 2)) if self.linear else self.proj_in(y).flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            y = block(y, context)
        if self.linear:
            return x + self.proj_out(y).transpose(1, 2).unflatten(2, (height, width))
        return x + self.proj_out(y.transpose(1, 2).unflatten(2, (height, width)))


class TwinResample(nn.Module):
    """`tinydiff.models.blocks.Downsample2D` and `Upsample2D`: a convolution, with stride 2 or after doubling the pixels."""

    def __init__(self, channels: int, stride: int, padding: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=stride, padding=padding)

    def forward(self, x: torch.Tensor, size: Any = None) -> torch.Tensor:
        """(N, C, H, W) to half the size, or to twice, cut to `size`."""
        if size is None:
            return self.conv(x if self.conv.padding != (0, 0) else F.pad(x, (0, 1, 0, 1)))
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(x[:, :, : size[0], : size[1]])


class TwinBlock(nn.Module):
    """Resnets, each with attention after it where the block has that, and a resampler where it has one."""

    resnets: Any
    attentions: Any
    downsamplers: Any
    upsamplers: Any

    def __init__(self, resnets: list[TwinResnet], attentions: list[nn.Module]) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        if attentions:
            self.attentions = nn.ModuleList(attentions)

    def layer(self, i: int, x: torch.Tensor, time: torch.Tensor | None = None, *context: torch.Tensor) -> torch.Tensor:
        """The i-th resnet and its attention, which is shown the context if there is one."""
        x = self.resnets[i](x, time)
        return self.attentions[i](x, *context) if hasattr(self, "attentions") and i < len(self.attentions) else x


class TwinUNet(nn.Module):
    """`tinydiff.models.UNet2DModel`, built from its config."""

    with_attention = "Attn"

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        widths, depth = list(config["block_out_channels"]), config["layers_per_block"]
        groups, eps, last = config["norm_num_groups"], config["norm_eps"], len(widths) - 1
        first, time_size = widths[0], config["time_embedding_dim"] or 4 * widths[0]
        self.config = config

        def resnet(a: int, b: int) -> TwinResnet:
            return TwinResnet(a, b, groups, eps, time_size)

        def attentions(count: int, level: int) -> list[nn.Module]:
            return [self.attention(level) for _ in range(count)]

        self.conv_in = nn.Conv2d(config["in_channels"], first, 3, padding=1)
        self.time_embedding: Any = nn.Module()
        self.time_embedding.linear_1 = nn.Linear(first, time_size)
        self.time_embedding.linear_2 = nn.Linear(time_size, time_size)
        classes = config["num_class_embeds"]
        self.class_embedding = nn.Embedding(classes, time_size) if classes else None

        self.down_blocks: Any = nn.ModuleList()
        self.up_blocks: Any = nn.ModuleList()
        skips, channels = [first], first
        for i, (width, kind) in enumerate(zip(widths, config["down_block_types"])):
            block = TwinBlock(
                [resnet(channels if j == 0 else width, width) for j in range(depth)],
                attentions(depth * kind.startswith(self.with_attention), i),
            )
            skips += [width] * depth
            if i < last:
                block.downsamplers = nn.ModuleList([TwinResample(width, 2, config["downsample_padding"])])
                skips.append(width)
            self.down_blocks.append(block)
            channels = width
        self.mid_block = TwinBlock(
            [resnet(channels, channels), resnet(channels, channels)], attentions(int(config.get("add_attention", True)), last)
        )
        for i, (width, kind) in enumerate(zip(reversed(widths), config["up_block_types"])):
            resnets = []
            for _ in range(depth + 1):
                resnets.append(resnet(channels + skips.pop(), width))
                channels = width
            block = TwinBlock(resnets, attentions((depth + 1) * kind.startswith(self.with_attention), last - i))
            if i < last:
                block.upsamplers = nn.ModuleList([TwinResample(width, 1, 1)])
            self.up_blocks.append(block)
        self.conv_norm_out = nn.GroupNorm(groups, first, eps)
        self.conv_out = nn.Conv2d(first, config["out_channels"], 3, padding=1)

    def attention(self, level: int) -> nn.Module:
        """What follows a resnet at a resolution."""
        config, width = self.config, self.config["block_out_channels"][level]
        heads = width // (config["attention_head_dim"] or width)
        return TwinAttention(width, heads, config["norm_num_groups"], config["norm_eps"])

    def embed(self, t: torch.Tensor) -> torch.Tensor:
        """Sines and cosines of t (N,): (N, first width)."""
        half = self.conv_in.out_channels // 2
        steps = torch.arange(half, dtype=torch.float64) / (half - self.config["freq_shift"])
        angles = t[:, None].double() * torch.exp(-math.log(10000) * steps)
        parts = [angles.cos(), angles.sin()]
        return torch.cat(parts if self.config["flip_sin_to_cos"] else parts[::-1], 1)

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, class_labels: torch.Tensor | None = None, *context: torch.Tensor
    ) -> torch.Tensor:
        """x (N, C, H, W), t (N,), class_labels (N,) to (N, out_channels, H, W); every attention is shown the context."""
        embedded = self.embed(t).float().to(x.dtype)  # rounded to float32 as in the published models, whatever x is
        embedded = self.time_embedding.linear_2(F.silu(self.time_embedding.linear_1(embedded)))
        if self.class_embedding is not None:
            embedded = embedded + self.class_embedding(class_labels)
        time = F.silu(embedded)

        x = self.conv_in(x)
        skips = [x]
        for block in self.down_blocks:
            for i in range(len(block.resnets)):
                x = block.layer(i, x, time, *context)
                skips.append(x)
            if hasattr(block, "downsamplers"):
                x = block.downsamplers[0](x)
                skips.append(x)
        x = self.mid_block.layer(1, self.mid_block.layer(0, x, time, *context), time)
        for block in self.up_blocks:
            for i in range(len(block.resnets)):
                x = block.layer(i, torch.cat([x, skips.pop()], 1), time, *context)
            if hasattr(block, "upsamplers"):
                x = block.upsamplers[0](x, skips[-1].shape[2:])
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class TwinConditionUNet(TwinUNet):
    """`tinydiff.models.UNet2DConditionModel`, built from its config."""

    with_attention = "CrossAttn"

    def attention(self, level: int) -> nn.Module:
        """See `TwinUNet`."""
        config = self.config
        width, heads, depth = (
            value if isinstance(value, int) else value[level]
            for value in (config[name] for name in ("block_out_channels", "attention_head_dim", "transformer_layers_per_block"))
        )
        linear = config["use_linear_projection"]
        return TwinTransformer(width, heads, depth, config["cross_attention_dim"], config["norm_num_groups"], linear)

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor, class_labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x (N, C, H, W), t (N,), context (N, S, cross_attention_dim) to (N, out_channels, H, W)."""
        return super().forward(x, t, class_labels, context)


class TwinHalf(nn.Module):
    """`tinydiff.models.autoencoder.Encoder`, or with `up` the `Decoder`."""

    def __init__(
        self, in_channels: int, out_channels: int, widths: list[int], depth: int, groups: int, attention: bool, up: bool
    ) -> None:
        super().__init__()

        def resnets(before: int, width: int, count: int) -> list[TwinResnet]:
            return [TwinResnet(before if i == 0 else width, width, groups, EPS) for i in range(count)]

        widths = widths[::-1] if up else widths
        middle = widths[0] if up else widths[-1]
        self.up = up
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.mid_block = TwinBlock(resnets(middle, middle, 2), [TwinAttention(middle, 1, groups, EPS)] if attention else [])
        blocks = nn.ModuleList()
        for before, width in zip([widths[0], *widths], widths):
            block = TwinBlock(resnets(before, width, depth + up), [])
            if len(blocks) < len(widths) - 1:
                resample = nn.ModuleList([TwinResample(width, 1, 1) if up else TwinResample(width, 2, 0)])
                setattr(block, "upsamplers" if up else "downsamplers", resample)
            blocks.append(block)
        setattr(self, "up_blocks" if up else "down_blocks", blocks)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        """Resnet, attention, resnet."""
        return self.mid_block.layer(1, self.mid_block.layer(0, x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in, H, W) to (N, out, H', W')."""
        x = self.conv_in(x)
        if self.up:
            x = self.middle(x)
        for block in self.up_blocks if self.up else self.down_blocks:
            for i in range(len(block.resnets)):
                x = block.layer(i, x)
            if hasattr(block, "downsamplers"):
                x = block.downsamplers[0](x)
            if hasattr(block, "upsamplers"):
                x = block.upsamplers[0](x, (2 * x.shape[2], 2 * x.shape[3]))
        if not self.up:
            x = self.middle(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class TwinAutoencoder(nn.Module):
    """`tinydiff.models.AutoencoderKL`, built from its config."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        latent = config["latent_channels"]
        shape = (list(config["block_out_channels"]), config["layers_per_block"], config["norm_num_groups"])
        attention = config["mid_block_add_attention"]
        self.encoder = TwinHalf(config["in_channels"], 2 * latent, *shape, attention, up=False)
        self.decoder = TwinHalf(latent, config["out_channels"], *shape, attention, up=True)
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1)
        self.post_quant_conv = nn.Conv2d(latent, latent, 1)

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-variance of the latents of x (N, C, H, W)."""
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, 1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """(N, latent, h, w) to (N, C, H, W)."""
        return self.decoder(self.post_quant_conv(z))


class TwinClassifier(nn.Module):
    """`tinydiff.models.Classifier`, built from its config."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        widths, groups = list(config["widths"]), config["norm_num_groups"]
        channels = [config["in_channels"], *widths]
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in zip(channels, widths))
        self.plain = nn.ModuleList(nn.Conv2d(b, b, 3, padding=1) for b in widths)
        self.norm_down = nn.ModuleList(nn.GroupNorm(groups, b) for b in widths)
        self.norm_plain = nn.ModuleList(nn.GroupNorm(groups, b) for b in widths)
        self.head = nn.Linear(widths[-1], config["num_classes"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) to logits (N, num_classes)."""
        for down, norm_down, plain, norm_plain in zip(self.down, self.norm_down, self.plain, self.norm_plain):
            x = F.silu(norm_down(down(x)))
            x = F.silu(norm_plain(plain(x)))
        return self.head(x.mean((2, 3)))


def twin(model: Model) -> Any:
    """The twin of one of our models, with the same weights. Raises TypeError for a model that has none."""
    twins: dict[type, Any] = {
        UNet2DModel: TwinUNet,
        UNet2DConditionModel: TwinConditionUNet,
        AutoencoderKL: TwinAutoencoder,
        Classifier: TwinClassifier,
    }
    if type(model) not in twins:
        raise TypeError(f"{type(model).__name__} has no twin; there are {', '.join(cls.__name__ for cls in twins)}")
    made = twins[type(model)](model.config)
    load(made, model)
    return made


def load(made: nn.Module, model: Model) -> None:
    """Copy our weights into a twin, names and shapes checked, and take over their dtype."""
    state = {name: torch.from_numpy(array.copy()) for name, array in published(model).items()}
    made.to(next(iter(state.values())).dtype).load_state_dict(state, strict=True)


def published(model: Model) -> dict[str, np.ndarray]:
    """Our weights by name in the published layout, which is PyTorch's."""
    return {name: io.to_disk(name, p.data, p.layout) for name, p in model.named_parameters()}


def gradients(model: Model) -> dict[str, np.ndarray]:
    """Our gradients by name in PyTorch's layout."""
    return {name: io.to_disk(name, p.grad.data, p.layout) for name, p in model.named_parameters() if p.grad is not None}
