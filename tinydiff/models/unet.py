"""The UNet that predicts the noise in a picture: names and arithmetic of the published UNet2DModel, channels last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np

from tinydiff import autograd, ops
from tinydiff.models.blocks import (
    Block,
    Downsample2D,
    ResnetBlock2D,
    SpatialAttention,
    TimestepEmbedding,
    Upsample2D,
    timestep_embedding,
)
from tinydiff.models.model import Model, supported
from tinydiff.nn import Conv2d, Embedding, GroupNorm, Module, ModuleList
from tinydiff.replay import Replay
from tinydiff.tensor import Tensor


class UNet(Model):
    """What the UNets share: down to a low resolution and up again, skips across, and the time told to every resnet.

    Args:
        channels: of the noisy pictures, and of the predictions.
        widths: at each resolution, the first at full size. depth: resnets in each down block; up blocks have one more.
        time_size: numbers of the embedded time. num_class_embeds: entries of the table that is added to it, if any.
        attention: makes what follows a resnet at a resolution (0: full size).
        attends: whether the down blocks have attention, whether the middle has, whether the up blocks have.

    Attributes:
        gradient_checkpointing: whether each layer's inside is forgotten and computed again in backward.
    """

    with_attention: ClassVar[str]  # how the names of blocks with attention begin

    def __init__(
        self,
        channels: tuple[int, int],
        widths: Sequence[int],
        depth: int,
        groups: int,
        eps: float,
        time_size: int,
        flip_sin_to_cos: bool,
        freq_shift: int,
        num_class_embeds: int | None,
        downsample_padding: int,
        attention: Callable[[int], Module],
        attends: tuple[Sequence[bool], bool, Sequence[bool]],
    ) -> None:
        first, last = widths[0], len(widths) - 1
        self.flip_sin_to_cos, self.freq_shift, self.first = flip_sin_to_cos, freq_shift, first
        self.gradient_checkpointing = False
        self.replay = Replay()

        def resnet(in_size: int, out_size: int) -> ResnetBlock2D:
            return ResnetBlock2D(in_size, out_size, groups, eps, time_size)

        def attentions(level: int, count: int, wanted: bool) -> list[Module]:
            return [attention(level) for _ in range(count if wanted else 0)]

        self.conv_in = Conv2d(channels[0], first, 3, padding=1)
        self.time_embedding = TimestepEmbedding(first, time_size)
        self.class_embedding = Embedding(num_class_embeds, time_size) if num_class_embeds else None

        self.down_blocks: ModuleList[Block] = ModuleList()
        skips, before = [first], first
        for level, width in enumerate(widths):
            resnets = [resnet(before if j == 0 else width, width) for j in range(depth)]
            block = Block(resnets, attentions(level, depth, attends[0][level]))
            skips += [width] * depth
            if level < last:
                block.downsamplers = ModuleList([Downsample2D(width, downsample_padding)])
                skips.append(width)
            self.down_blocks.append(block)
            before = width

        self.mid_block = Block([resnet(before, before), resnet(before, before)], attentions(last, 1, attends[1]))

        self.up_blocks: ModuleList[Block] = ModuleList()
        for i, width in enumerate(reversed(widths)):
            resnets = []
            for _ in range(depth + 1):
                resnets.append(resnet(before + skips.pop(), width))
                before = width
            block = Block(resnets, attentions(last - i, depth + 1, attends[2][i]))
            if i < last:
                block.upsamplers = ModuleList([Upsample2D(width)])
            self.up_blocks.append(block)

        self.conv_norm_out = GroupNorm(groups, first, eps, "silu")
        self.conv_out = Conv2d(first, channels[1], 3, padding=1)

    @classmethod
    def _attending(cls, widths: Sequence[int], down: Sequence[str], up: Sequence[str]) -> tuple[list[bool], list[bool]]:
        """Which of the named blocks have attention. Raises ValueError for unknown names, or another number than widths."""
        if not len(widths) == len(down) == len(up):
            raise ValueError(
                f"{cls.__name__}: block_out_channels has {len(widths)} entries, down_block_types {len(down)}, "
                f"up_block_types {len(up)}; they must be as many"
            )
        for kinds, plain in ((down, "DownBlock2D"), (up, "UpBlock2D")):
            for kind in kinds:
                if kind not in (plain, cls.with_attention + plain):
                    raise ValueError(
                        f"{cls.__name__}: unknown block type {kind!r}; use {plain!r} or '{cls.with_attention}{plain}'"
                    )
        return [kind != "DownBlock2D" for kind in down], [kind != "UpBlock2D" for kind in up]

    def _run(self, x: Tensor, t: Any, class_labels: Any, *context: Tensor) -> Tensor:
        """x (N, H, W, in), t (N,) or one number, class_labels (N,) if there are classes; every attention is shown `context`."""
        if (class_labels is None) != (self.class_embedding is None):
            told = "needs class_labels (N,)" if class_labels is None else "has no class_embedding, so class_labels can't be used"
            raise ValueError(f"{type(self).__name__} {told}")
        times = np.broadcast_to(np.asarray(t, np.float64), (x.shape[0],))
        waves = timestep_embedding(times, self.first, self.flip_sin_to_cos, self.freq_shift).to(x.device)
        kind = self.class_embedding(class_labels) if self.class_embedding is not None else None
        return self.replay(self._predict, self, x, waves, kind, *context)

    def _predict(self, x: Tensor, waves: Tensor, kind: Tensor | None, *context: Tensor) -> Tensor:
        """The rest, given the time as sines and cosines (N, first) and the class as its row of the table (N, time_size)."""
        embedded = self.time_embedding(waves)
        time = ops.silu(embedded if kind is None else embedded + kind)  # every resnet starts with this

        x = self.conv_in(x)
        skips = [x]
        for block in self.down_blocks:
            for resnet, attention in block.layers():
                x = self._layer(resnet, attention, x, time, *context)
                skips.append(x)
            if block.downsamplers is not None:
                x = block.downsamplers[0](x)
                skips.append(x)

        first, second = self.mid_block.resnets
        x = self._layer(first, self.mid_block.attentions and self.mid_block.attentions[0], x, time, *context)
        x = self._layer(second, None, x, time)

        for block in self.up_blocks:
            for resnet, attention in block.layers():
                x = self._layer(resnet, attention, ops.concat([x, skips.pop()], -1), time, *context)
            if block.upsamplers is not None:
                x = block.upsamplers[0](x, skips[-1].shape[1:3])
        return self.conv_out(self.conv_norm_out(x))

    def _layer(self, resnet: Module, attention: Module | None, x: Tensor, time: Tensor, *context: Tensor) -> Tensor:
        """A resnet and its attention, forgotten and computed again in backward if `gradient_checkpointing` is set."""

        def run(x: Tensor, time: Tensor, *context: Tensor) -> Tensor:
            y = resnet(x, time)
            return y if attention is None else attention(y, *context)

        return autograd.checkpoint(run, x, time, *context) if self.gradient_checkpointing else run(x, time, *context)


class UNet2DModel(UNet):
    """Noisy picture and time in, prediction of the same size out; optionally told the class.

    Args, as in the published configs:
        block_out_channels: width at each resolution, the first at full size.
        down_block_types, up_block_types: "DownBlock2D" or "AttnDownBlock2D", "UpBlock2D" or "AttnUpBlock2D"; the "Attn" kinds
            have self-attention after every resnet. The up blocks are named from the lowest resolution to the full one.
        attention_head_dim: size of a head (None: one head).
        num_class_embeds: entries of the class table; None for a model without classes. By convention of this package
            the last entry is the null class, "not told".
    Raises ValueError for values that no published model of this kind uses.
    """

    with_attention = "Attn"

    def __init__(
        self,
        sample_size: int | Sequence[int] | None = None,
        in_channels: int = 3,
        out_channels: int = 3,
        center_input_sample: bool = False,
        time_embedding_type: str = "positional",
        time_embedding_dim: int | None = None,
        freq_shift: int = 0,
        flip_sin_to_cos: bool = True,
        down_block_types: Sequence[str] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        mid_block_type: str = "UNetMidBlock2D",
        up_block_types: Sequence[str] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        block_out_channels: Sequence[int] = (224, 448, 672, 896),
        layers_per_block: int = 2,
        mid_block_scale_factor: float = 1,
        downsample_padding: int = 1,
        downsample_type: str = "conv",
        upsample_type: str = "conv",
        dropout: float = 0.0,
        act_fn: str = "silu",
        attention_head_dim: int | None = 8,
        norm_num_groups: int = 32,
        attn_norm_num_groups: int | None = None,
        norm_eps: float = 1e-5,
        resnet_time_scale_shift: str = "default",
        add_attention: bool = True,
        class_embed_type: str | None = None,
        num_class_embeds: int | None = None,
        num_train_timesteps: int | None = None,
    ) -> None:
        supported(
            "UNet2DModel",
            center_input_sample=(center_input_sample, False),
            time_embedding_type=(time_embedding_type, "positional"),
            mid_block_type=(mid_block_type, "UNetMidBlock2D"),
            mid_block_scale_factor=(mid_block_scale_factor, 1),
            downsample_type=(downsample_type, "conv"),
            upsample_type=(upsample_type, "conv"),
            dropout=(dropout, 0.0),
            act_fn=(act_fn, "silu"),
            attn_norm_num_groups=(attn_norm_num_groups, None),
            resnet_time_scale_shift=(resnet_time_scale_shift, "default"),
            class_embed_type=(class_embed_type, None),
        )
        widths = list(block_out_channels)
        down, up = self._attending(widths, down_block_types, up_block_types)

        def attention(level: int) -> SpatialAttention:
            width = widths[level]
            head = attention_head_dim or width
            if width % head:
                raise ValueError(
                    f"UNet2DModel: attention_head_dim={head} must divide the width {width} of every block with attention"
                )
            return SpatialAttention(width, width // head, head, norm_num_groups, norm_eps)

        super().__init__(
            (in_channels, out_channels),
            widths,
            layers_per_block,
            norm_num_groups,
            norm_eps,
            time_embedding_dim or 4 * widths[0],
            flip_sin_to_cos,
            freq_shift,
            num_class_embeds,
            downsample_padding,
            attention,
            (down, add_attention, up),
        )

    def forward(self, x: Tensor, t: Any, class_labels: Any = None) -> Tensor:
        """x (N, H, W, in_channels), t (N,) or one number in training timesteps (fractions allowed), class_labels (N,) integers.

        Returns (N, H, W, out_channels). Raises ValueError when labels are given to a model without classes, or not to one with.
        """
        return self._run(x, t, class_labels)
