"""The UNet that is told what to draw: names and arithmetic of the published UNet2DConditionModel, channels last."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tinydiff.models.model import supported
from tinydiff.models.transformer import Transformer2DModel
from tinydiff.models.unet import UNet
from tinydiff.tensor import Tensor, as_tensor


class UNet2DConditionModel(UNet):
    """Noisy picture, time and a text's vectors in, prediction of the picture's size out (Rombach et al. 2022).

    Args, as in the published configs:
        block_out_channels: width at each resolution, the first at full size.
        down_block_types, up_block_types: "DownBlock2D" or "CrossAttnDownBlock2D", "UpBlock2D" or "CrossAttnUpBlock2D"; the
            "CrossAttn" kinds have a transformer after every resnet. The up blocks are named from the lowest resolution up.
        mid_block_type: "UNetMidBlock2DCrossAttn".
        cross_attention_dim: size of the text's vectors.
        attention_head_dim: the *number* of heads, one for all or one a resolution (in UNet2DModel it is the size of a head).
        transformer_layers_per_block: transformer blocks after each resnet, one for all or one a resolution.
        use_linear_projection: the transformers' projections are stored as linear layers.
        num_class_embeds: entries of a table of classes, told beside the text; None for none.
    Raises ValueError for values that are not supported.
    """

    with_attention = "CrossAttn"

    def __init__(
        self,
        sample_size: int | Sequence[int] | None = None,
        in_channels: int = 4,
        out_channels: int = 4,
        center_input_sample: bool = False,
        flip_sin_to_cos: bool = True,
        freq_shift: int = 0,
        down_block_types: Sequence[str] = (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
        mid_block_type: str = "UNetMidBlock2DCrossAttn",
        up_block_types: Sequence[str] = ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
        only_cross_attention: bool = False,
        block_out_channels: Sequence[int] = (320, 640, 1280, 1280),
        layers_per_block: int = 2,
        downsample_padding: int = 1,
        mid_block_scale_factor: float = 1,
        dropout: float = 0.0,
        act_fn: str = "silu",
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
        cross_attention_dim: int = 1280,
        transformer_layers_per_block: int | Sequence[int] = 1,
        reverse_transformer_layers_per_block: Any = None,
        encoder_hid_dim: int | None = None,
        encoder_hid_dim_type: str | None = None,
        attention_head_dim: int | Sequence[int] = 8,
        num_attention_heads: int | None = None,
        dual_cross_attention: bool = False,
        use_linear_projection: bool = False,
        class_embed_type: str | None = None,
        addition_embed_type: str | None = None,
        addition_time_embed_dim: int | None = None,
        num_class_embeds: int | None = None,
        upcast_attention: bool = False,
        resnet_time_scale_shift: str = "default",
        resnet_skip_time_act: bool = False,
        resnet_out_scale_factor: float = 1.0,
        time_embedding_type: str = "positional",
        time_embedding_dim: int | None = None,
        time_embedding_act_fn: str | None = None,
        timestep_post_act: str | None = None,
        time_cond_proj_dim: int | None = None,
        conv_in_kernel: int = 3,
        conv_out_kernel: int = 3,
        projection_class_embeddings_input_dim: int | None = None,
        attention_type: str = "default",
        class_embeddings_concat: bool = False,
        mid_block_only_cross_attention: bool | None = None,
        cross_attention_norm: str | None = None,
        addition_embed_type_num_heads: int = 64,
    ) -> None:
        # What is not looked at has no effect while the rest is as it must be: upcast_attention is about half precision.
        supported(
            "UNet2DConditionModel",
            center_input_sample=(center_input_sample, False),
            mid_block_type=(mid_block_type, "UNetMidBlock2DCrossAttn"),
            only_cross_attention=(only_cross_attention, False),
            mid_block_scale_factor=(mid_block_scale_factor, 1),
            dropout=(dropout, 0.0),
            act_fn=(act_fn, "silu"),
            reverse_transformer_layers_per_block=(reverse_transformer_layers_per_block, None),
            encoder_hid_dim=(encoder_hid_dim, None),
            encoder_hid_dim_type=(encoder_hid_dim_type, None),
            num_attention_heads=(num_attention_heads, None),
            dual_cross_attention=(dual_cross_attention, False),
            class_embed_type=(class_embed_type, None),
            addition_embed_type=(addition_embed_type, None),
            resnet_time_scale_shift=(resnet_time_scale_shift, "default"),
            resnet_skip_time_act=(resnet_skip_time_act, False),
            resnet_out_scale_factor=(resnet_out_scale_factor, 1.0),
            time_embedding_type=(time_embedding_type, "positional"),
            time_embedding_act_fn=(time_embedding_act_fn, None),
            timestep_post_act=(timestep_post_act, None),
            time_cond_proj_dim=(time_cond_proj_dim, None),
            conv_in_kernel=(conv_in_kernel, 3),
            conv_out_kernel=(conv_out_kernel, 3),
            attention_type=(attention_type, "default"),
            class_embeddings_concat=(class_embeddings_concat, False),
            cross_attention_norm=(cross_attention_norm, None),
        )
        widths = list(block_out_channels)
        down, up = self._attending(widths, down_block_types, up_block_types)
        heads = _by_level("attention_head_dim", attention_head_dim, len(widths))
        depths = _by_level("transformer_layers_per_block", transformer_layers_per_block, len(widths))
        self.context_dim = cross_attention_dim

        def attention(level: int) -> Transformer2DModel:
            return Transformer2DModel(
                widths[level], heads[level], depths[level], cross_attention_dim, norm_num_groups, use_linear_projection
            )

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
            (down, True, up),
        )

    def forward(self, x: Tensor, t: Any, context: Any, class_labels: Any = None) -> Tensor:
        """x (N, H, W, in_channels), t (N,) or one number in training timesteps, context (N, length, cross_attention_dim),
        a tensor or an array.

        Returns (N, H, W, out_channels). There is no mask: the padding of a text is looked at like the rest, as in the
        published models. Raises ValueError for a context of another shape, and for labels as UNet2DModel does.
        """
        context = context if isinstance(context, Tensor) else as_tensor(context).to(x.device)
        if context.ndim != 3 or context.shape[0] != x.shape[0] or context.shape[2] != self.context_dim:
            raise ValueError(
                f"UNet2DConditionModel needs context (N, length, width) of shape ({x.shape[0]}, …, {self.context_dim}), "
                f"not {context.shape}"
            )
        return self._run(x, t, class_labels, context)


def _by_level(name: str, value: int | Sequence[int], levels: int) -> list[int]:
    """One value a resolution. Raises ValueError for another number of them."""
    values = [value] * levels if isinstance(value, int) else list(value)
    if len(values) != levels:
        raise ValueError(f"UNet2DConditionModel: {name} has {len(values)} entries; give one number, or {levels}")
    return values
