"""The autoencoder that turns pictures into small latents and back: names and arithmetic of the published AutoencoderKL."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tinydiff import autograd, ops, random
from tinydiff.models.blocks import Block, Downsample2D, ResnetBlock2D, SpatialAttention, Upsample2D
from tinydiff.models.model import Model, supported
from tinydiff.nn import Conv2d, GroupNorm, Module, ModuleList
from tinydiff.tensor import Tensor, as_tensor

EPS = 1e-6  # of every norm here; the UNets have 1e-5

# The narrow network of the lecture: 512×512×3 → 256×256×6 → 128×128×12 → 64×64×24 → ResNet blocks → 64×64×4, and back.
LECTURE: dict[str, Any] = {
    "sample_size": 512,
    "block_out_channels": [3, 6, 12, 24],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 1,
    "norm_num_groups": 3,
    "latent_channels": 4,
}

# How files made before 2023 call the parts of the attention.
_OLDER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class DiagonalGaussian:
    """The encoder's answer: an independent Gaussian for each number of the latents.

    Attributes:
        mean, logvar: (N, h, w, latent_channels); logvar clamped to [-30, 20].
    """

    def __init__(self, moments: Tensor) -> None:
        self.mean, logvar = ops.split(moments, moments.shape[-1] // 2, axis=-1)
        self.logvar = ops.clip(logvar, -30.0, 20.0)

    def mode(self) -> Tensor:
        """The likeliest latents, the mean: the bottleneck of a plain autoencoder, which ignores logvar."""
        return self.mean

    def sample(self, rng: np.random.Generator | None = None) -> Tensor:
        """mean + std · noise, differentiable by both (Kingma & Welling 2014); by default the package's generator draws."""
        noise = (rng or random.generator()).standard_normal(self.mean.shape, np.float32)
        return self.mean + ops.exp(0.5 * self.logvar) * as_tensor(noise.astype(self.mean.dtype, copy=False)).to(self.mean.device)

    def kl(self) -> Tensor:
        """KL divergence from the standard normal, in nats, summed over each sample's numbers: (N,)."""
        terms = self.mean * self.mean + ops.exp(self.logvar) - self.logvar - 1.0
        return 0.5 * ops.sum(terms, axis=(1, 2, 3))


class _Half(Module):
    """An encoder or decoder: one layer after another, with nothing across."""

    gradient_checkpointing = False

    def layers(self) -> Iterator[Module]:
        """Everything in the order in which it is run; norms stand just before their convolution."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, in) to (N, H', W', out)."""
        for layer in self.layers():
            x = autograd.checkpoint(layer, x) if self.gradient_checkpointing else layer(x)
        return x


class Encoder(_Half):
    """Pictures to moments. Each block but the last ends with a convolution of stride 2 that pads right and bottom only."""

    def __init__(
        self, in_channels: int, out_channels: int, widths: Sequence[int], depth: int, groups: int, attention: bool
    ) -> None:
        self.conv_in = Conv2d(in_channels, widths[0], 3, padding=1)
        self.down_blocks: ModuleList[Block] = ModuleList()
        for before, width in zip([widths[0], *widths], widths):
            block = Block(_resnets(before, width, depth, groups))
            if len(self.down_blocks) < len(widths) - 1:
                block.downsamplers = ModuleList([Downsample2D(width, padding=0)])
            self.down_blocks.append(block)
        self.mid_block = _middle(widths[-1], groups, attention)
        self.conv_norm_out = GroupNorm(groups, widths[-1], EPS, "silu")
        self.conv_out = Conv2d(widths[-1], out_channels, 3, padding=1)

    def layers(self) -> Iterator[Module]:
        """See `_Half`."""
        yield self.conv_in
        for block in self.down_blocks:
            yield from block.resnets
            yield from block.downsamplers or ()
        yield from _in_turn(self.mid_block)
        yield self.conv_norm_out
        yield self.conv_out


class Decoder(_Half):
    """Latents to pictures: the encoder's mirror image, with one resnet more in each block."""

    def __init__(
        self, in_channels: int, out_channels: int, widths: Sequence[int], depth: int, groups: int, attention: bool
    ) -> None:
        widths = widths[::-1]
        self.conv_in = Conv2d(in_channels, widths[0], 3, padding=1)
        self.mid_block = _middle(widths[0], groups, attention)
        self.up_blocks: ModuleList[Block] = ModuleList()
        for before, width in zip([widths[0], *widths], widths):
            block = Block(_resnets(before, width, depth + 1, groups))
            if len(self.up_blocks) < len(widths) - 1:
                block.upsamplers = ModuleList([Upsample2D(width)])
            self.up_blocks.append(block)
        self.conv_norm_out = GroupNorm(groups, widths[-1], EPS, "silu")
        self.conv_out = Conv2d(widths[-1], out_channels, 3, padding=1)

    def layers(self) -> Iterator[Module]:
        """See `_Half`."""
        yield self.conv_in
        yield from _in_turn(self.mid_block)
        for block in self.up_blocks:
            yield from block.resnets
            yield from block.upsamplers or ()
        yield self.conv_norm_out
        yield self.conv_out


def _resnets(before: int, width: int, count: int, groups: int) -> list[ResnetBlock2D]:
    return [ResnetBlock2D(before if i == 0 else width, width, groups, EPS) for i in range(count)]


def _middle(width: int, groups: int, attention: bool) -> Block:
    """Resnet, attention of one head among all pixels, resnet."""
    attentions = [SpatialAttention(width, 1, width, groups, EPS)] if attention else []
    return Block(_resnets(width, width, 2, groups), attentions)


def _in_turn(middle: Block) -> Iterator[Module]:
    first, second = middle.resnets
    yield first
    yield from middle.attentions or ()
    yield second


class AutoencoderKL(Model):
    """Pictures in [-1, 1] to latents of 1/factor of their height and width, and back (Rombach et al. 2022).

    The published networks have a Gaussian bottleneck; `encode(x).mode()` is the plain one, with the same weights' names: an
    autoencoder trained with KL weight 0 uses it and leaves logvar alone.

    Args, as in the published configs:
        block_out_channels: width at each resolution, the first at full size; each further one halves height and width.
        layers_per_block: resnets a block of the encoder; a block of the decoder has one more.
        latent_channels: channels of the latents.
        scaling_factor, shift_factor: latents for a denoiser are (z - shift_factor) · scaling_factor.
    Raises ValueError for values that are not supported.

    Attributes:
        factor: how many pixels of height (and width) become one of the latents.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: Sequence[str] = ("DownEncoderBlock2D",),
        up_block_types: Sequence[str] = ("UpDecoderBlock2D",),
        block_out_channels: Sequence[int] = (64,),
        layers_per_block: int = 1,
        act_fn: str = "silu",
        latent_channels: int = 4,
        norm_num_groups: int = 32,
        sample_size: int | Sequence[int] = 32,
        scaling_factor: float = 0.18215,
        shift_factor: float | None = None,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
        force_upcast: bool = True,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
        mid_block_add_attention: bool = True,
    ) -> None:
        supported("AutoencoderKL", act_fn=(act_fn, "silu"), latents_mean=(latents_mean, None), latents_std=(latents_std, None))
        widths = list(block_out_channels)
        for name, types, only in (
            ("down_block_types", down_block_types, "DownEncoderBlock2D"),
            ("up_block_types", up_block_types, "UpDecoderBlock2D"),
        ):
            if list(types) != [only] * len(widths):
                raise ValueError(
                    f"AutoencoderKL: {name}={list(types)} is not supported; use {only!r} {len(widths)} times, "
                    "once for each of block_out_channels"
                )
        if not scaling_factor > 0:
            raise ValueError(f"AutoencoderKL: scaling_factor={scaling_factor} must be positive")
        self.factor = 2 ** (len(widths) - 1)
        shape = (widths, layers_per_block, norm_num_groups, mid_block_add_attention)
        self.encoder = Encoder(in_channels, 2 * latent_channels, *shape)
        self.decoder = Decoder(latent_channels, out_channels, *shape)
        self.quant_conv = Conv2d(2 * latent_channels, 2 * latent_channels, 1) if use_quant_conv else None
        self.post_quant_conv = Conv2d(latent_channels, latent_channels, 1) if use_post_quant_conv else None

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether each layer's inside is forgotten and computed again in backward: slower by a third, in far less memory."""
        return self.encoder.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        self.encoder.gradient_checkpointing = self.decoder.gradient_checkpointing = on

    def encoder_layers(self) -> Iterator[Module]:
        """All that `encode` runs, in order."""
        yield from self.encoder.layers()
        yield from [self.quant_conv] if self.quant_conv is not None else []

    def decoder_layers(self) -> Iterator[Module]:
        """All that `decode` runs, in order."""
        yield from [self.post_quant_conv] if self.post_quant_conv is not None else []
        yield from self.decoder.layers()

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """x (N, H, W, in_channels) to a Gaussian over latents (N, ⌈H/factor⌉, ⌈W/factor⌉, latent_channels).

        A height or width that the factor doesn't divide is first rounded up by repeating the last row or column.
        """
        moments = self.encoder(pad_to_multiple(x, self.factor))
        return DiagonalGaussian(moments if self.quant_conv is None else self.quant_conv(moments))

    def decode(self, z: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """z (N, h, w, latent_channels), not scaled, to (N, factor·h, factor·w, out_channels).

        What goes beyond `size` (height, width), that of the picture before it was padded, is cut off.
        """
        x = self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))
        return x if size is None or tuple(size) == x.shape[1:3] else x[:, : size[0], : size[1]]

    def forward(self, x: Tensor) -> Tensor:
        """Pictures (N, H, W, in_channels) through the plain bottleneck and back: (N, H, W, out_channels)."""
        return self.decode(self.encode(x).mode(), x.shape[1:3])

    def scale(self, z: Any) -> Any:
        """Latents as a denoiser wants them, of deviation about 1, from latents of `encode` (tensor or array)."""
        return (z - (self.config["shift_factor"] or 0.0)) * self.config["scaling_factor"]

    def unscale(self, z: Any) -> Any:
        """The inverse of `scale`: what `decode` takes."""
        return z / self.config["scaling_factor"] + (self.config["shift_factor"] or 0.0)

    @staticmethod
    def published_name(name: str) -> str:
        """Today's name of a weight in a file that may be older."""
        path, dot, kind = name.rpartition(".")
        parent, _, part = path.rpartition(".")
        return f"{parent}.{_OLDER[part]}{dot}{kind}" if ".attentions." in name and part in _OLDER else name


def pad_to_multiple(x: Tensor, factor: int) -> Tensor:
    """x (N, H, W, C) with its last row and column repeated until `factor` divides height and width."""
    for axis in (1, 2):
        size = x.shape[axis]
        if size % factor:
            x = ops.take(x, np.minimum(np.arange(-(-size // factor) * factor), size - 1), axis=axis)
    return x


# ------------------------------------------------------------------------------------------------------- what it looks like


def stages(config: Mapping[str, Any], height: int | None = None, width: int | None = None) -> list[tuple[str, int, int, int]]:
    """(what, height, width, channels) of the picture, after each stage of the network, of the latents, and back.

    By default for pictures of the config's sample_size. Builds nothing.
    """
    size = config.get("sample_size", 32)
    h, w = size if isinstance(size, Sequence) else (size, size)
    h, w = height or h, width or height or w
    widths, latent = config.get("block_out_channels", (64,)), config.get("latent_channels", 4)
    factor = 2 ** (len(widths) - 1)
    rows = [("picture", h, w, config.get("in_channels", 3))]
    sizes = [(-(-h // factor) * factor >> i, -(-w // factor) * factor >> i, width) for i, width in enumerate(widths)]
    rows += [(f"encoder block {i}", *size) for i, size in enumerate(sizes)]
    rows += [("encoder middle", *sizes[-1]), ("latents", *sizes[-1][:2], latent), ("decoder middle", *sizes[-1])]
    rows += [(f"decoder block {i}", *size) for i, size in enumerate(reversed(sizes))]
    return [*rows, ("picture", h, w, config.get("out_channels", 3))]


def stage_table(config: Mapping[str, Any], height: int | None = None, width: int | None = None) -> str:
    """`stages` as text, with how many numbers each holds, and how many times fewer the latents are than the picture's."""
    rows = stages(config, height, width)
    numbers = [h * w * c for _, h, w, c in rows]
    lines = [f"{what:16}{f'{h}×{w}×{c}':>14}{n:>14,}" for (what, h, w, c), n in zip(rows, numbers)]
    inside = numbers[[what for what, *_ in rows].index("latents")]
    return "\n".join([*lines, f"numbers in the picture / in the latents: {numbers[0] / inside:.4g}"])
