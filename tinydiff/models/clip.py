"""Encoders of text and pictures whose vectors meet: names and arithmetic of the published CLIP (Radford et al. 2021)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np

from tinydiff import ops
from tinydiff.backend import Array
from tinydiff.models.model import Model
from tinydiff.names import choose
from tinydiff.nn import Conv2d, Embedding, GroupNorm, LayerNorm, Linear, Module, ModuleList, Parameter, init, no_init
from tinydiff.tensor import Tensor, beside

ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu"}  # as configs and as ops.mlp call them

# What published config.json files also hold, and what changes nothing here: notes of the program that wrote them, how its
# weights were first drawn, dropout (never on in them), and how it would generate text, which these models don't do.
# fmt: off
_BOOKKEEPING = {
    "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "initializer_factor", "initializer_range",
    "attention_dropout", "dropout", "add_cross_attention", "bad_words_ids", "begin_suppress_tokens", "bos_token_id",
    "chunk_size_feed_forward", "cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty", "do_sample",
    "early_stopping", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "finetuning_task",
    "forced_bos_token_id", "forced_eos_token_id", "gradient_checkpointing", "id2label", "is_composition", "is_decoder",
    "is_encoder_decoder", "label2id", "length_penalty", "max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups",
    "num_beams", "num_return_sequences", "output_attentions", "output_hidden_states", "output_scores", "pad_token_id",
    "prefix", "problem_type", "pruned_heads", "remove_invalid_values", "repetition_penalty", "return_dict",
    "return_dict_in_generate", "sep_token_id", "suppress_tokens", "task_specific_params", "temperature", "text_config_dict",
    "tf_legacy_loss", "tie_encoder_decoder", "tie_word_embeddings", "tokenizer_class", "top_k", "top_p", "torchscript",
    "typical_p", "use_bfloat16", "use_cache", "vision_config_dict",
}
# fmt: on


class _Published(Model):
    """A model whose published config has much that doesn't matter here, and whose files may hold `position_ids`."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """As `Model.from_config`; bookkeeping of the published files is passed over."""
        return super().from_config({name: value for name, value in config.items() if name not in _BOOKKEEPING})

    @staticmethod
    def published_name(name: str) -> str | None:
        """The same, but for `position_ids`, which only count up."""
        return None if name.endswith(".position_ids") else name


def _linear(in_features: int, out_features: int, std: float, bias: bool = True) -> Linear:
    """A linear layer drawn as CLIP's are: normal weights, biases of 0."""
    layer = Linear(in_features, out_features, bias=False)
    layer.weight = Parameter(init.normal((in_features, out_features), std), "linear")
    layer.bias = Parameter(init.zeros((out_features,))) if bias else None
    return layer


def _embedding(entries: int, size: int) -> Embedding:
    table = Embedding(entries, size)
    table.weight = Parameter(init.normal((entries, size), 0.02))
    return table


def _picked(x: Tensor, positions: np.ndarray) -> Tensor:
    """Of each row of x (N, L, width) the vector at its position, (N, 1, width)."""
    n, length, width = x.shape
    return ops.reshape(ops.take(ops.reshape(x, (n * length, width)), np.arange(n) * length + positions), (n, 1, width))


class CLIPAttention(Module):
    """Multi-head attention of a sequence to itself, with CLIP's names."""

    def __init__(self, width: int, heads: int, depth: int) -> None:
        std = width**-0.5
        self.k_proj, self.v_proj, self.q_proj = (_linear(width, width, std * (2 * depth) ** -0.5) for _ in range(3))
        self.out_proj = _linear(width, width, std)
        self.heads = heads

    def forward(self, x: Tensor, source: Tensor, residual: Tensor, is_causal: bool, mask: Array | None = None) -> Tensor:
        """What x (N, Q, width) sees of source (N, L, width), added to the residual: (N, Q, width).

        If causal, position i looks at positions 0 … i.
        """
        q, k, v = self.q_proj(x), self.k_proj(source), self.v_proj(source)
        return self.out_proj(ops.scaled_dot_product_attention(q, k, v, mask, is_causal, heads=self.heads), residual)


class CLIPMLP(Module):
    """Two linear layers with an activation between."""

    def __init__(self, width: int, inner: int, depth: int, activation: str) -> None:
        self.fc1 = _linear(width, inner, (2 * width) ** -0.5)
        self.fc2 = _linear(inner, width, width**-0.5 * (2 * depth) ** -0.5)
        self.activation = choose(ACTIVATIONS, activation, "activation (hidden_act)")

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """(…, width) to the same, added to the residual."""
        return ops.mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias, residual, self.activation)


class CLIPEncoderLayer(Module):
    """Attention and MLP, each behind a layer norm and added to its input."""

    def __init__(self, width: int, heads: int, inner: int, depth: int, activation: str, eps: float) -> None:
        self.self_attn = CLIPAttention(width, heads, depth)
        self.layer_norm1 = LayerNorm(width, eps)
        self.mlp = CLIPMLP(width, inner, depth, activation)
        self.layer_norm2 = LayerNorm(width, eps)

    def forward(self, x: Tensor, is_causal: bool) -> Tensor:
        """(N, L, width) to the same."""
        y = self.layer_norm1(x)
        x = self.self_attn(y, y, x, is_causal)
        return self.mlp(self.layer_norm2(x), x)

    def at(self, positions: np.ndarray, x: Tensor, is_causal: bool) -> Tensor:
        """Of `forward` only what it gives at one position of each row, (N, 1, width), and no more computed than that needs."""
        mask = beside((np.arange(x.shape[1]) <= positions[:, None])[:, None, None], x.data) if is_causal else None
        one = _picked(x, positions)
        one = self.self_attn(self.layer_norm1(one), self.layer_norm1(x), one, False, mask)
        return self.mlp(self.layer_norm2(one), one)


class CLIPEncoder(Module):
    """Layers one after another. Raises ValueError if heads don't divide the width."""

    def __init__(self, width: int, heads: int, inner: int, depth: int, activation: str, eps: float) -> None:
        if heads < 1 or width % heads:
            raise ValueError(f"CLIP: num_attention_heads={heads} must divide hidden_size={width}")
        self.layers = ModuleList(CLIPEncoderLayer(width, heads, inner, depth, activation, eps) for _ in range(depth))

    def forward(self, x: Tensor, is_causal: bool = False) -> Tensor:
        """(N, L, width) to the same."""
        for layer in self.layers:
            x = layer(x, is_causal)
        return x

    def at(self, positions: np.ndarray, x: Tensor, is_causal: bool = False) -> Tensor:
        """Of `forward` only what it gives at one position of each row: (N, width). Of the last layer no other is computed."""
        layers = list(self.layers)
        for layer in layers[:-1]:
            x = layer(x, is_causal)
        return (layers[-1].at(positions, x, is_causal) if layers else _picked(x, positions))[:, 0]


# --------------------------------------------------------------------------------------------------------------------- text


class _TextEmbeddings(Module):
    def __init__(self, entries: int, length: int, width: int) -> None:
        self.token_embedding = _embedding(entries, width)
        self.position_embedding = _embedding(length, width)

    def forward(self, ids: np.ndarray) -> Tensor:
        """Integers (N, L) to (N, L, width)."""
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class CLIPTextTransformer(Module):
    """Embeddings, causal layers, a last layer norm. `eos` as in CLIPTextModel."""

    def __init__(self, entries: int, length: int, eos: int, width: int, heads: int, inner: int, depth: int, *rest: Any) -> None:
        self.length, self.eos, self.width = length, eos, width
        self.embeddings = _TextEmbeddings(entries, length, width)
        self.encoder = CLIPEncoder(width, heads, inner, depth, *rest)
        self.final_layer_norm = LayerNorm(width, rest[-1])

    def forward(self, ids: Any) -> Tensor:
        """Integers (N, L) to hidden states (N, L, width)."""
        return self.final_layer_norm(self.encoder(self.embeddings(self._checked(ids)), is_causal=True))

    def pooled(self, ids: Any) -> Tensor:
        """Integers (N, L) to the hidden state where each row's text ends: (N, width).

        Nothing behind the end is looked at, so no more is computed than the longest row needs.
        """
        ids = np.asarray(ids)
        if ids.ndim == 2 and ids.size:
            ids = ids[:, : ends_of(ids, self.eos).max() + 1]
        x = self.embeddings(self._checked(ids))
        return self.final_layer_norm(self.encoder.at(ends_of(ids, self.eos), x, is_causal=True))

    def _checked(self, ids: Any) -> np.ndarray:
        ids = np.asarray(ids)
        if ids.ndim != 2 or not 1 <= ids.shape[1] <= self.length:
            raise ValueError(f"CLIPTextModel takes token numbers (N, L) with L from 1 to {self.length}, not {ids.shape}")
        return ids


def ends_of(ids: Any, eos: int) -> np.ndarray:
    """Where each row of token numbers (N, L) ends: at its first `eos`; at its highest number if `eos` is 2, as in old configs."""
    ids = np.asarray(ids)
    return ids.argmax(1) if eos == 2 else (ids == eos).argmax(1)


class CLIPTextModel(_Published):
    """Tokens to a vector each, which knows of the tokens before it: what a text-to-image UNet looks at.

    Args, as in the published configs:
        hidden_size, intermediate_size: width of the vectors, and inside the MLPs.
        max_position_embeddings: the most tokens a row may have.
        eos_token_id: the token that ends a text. Old files say 2, which was never so: it means the token of the highest number.
    Raises ValueError for values that are not supported.
    """

    def __init__(
        self,
        vocab_size: int = 49408,
        hidden_size: int = 512,
        intermediate_size: int = 2048,
        projection_dim: int = 512,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 8,
        max_position_embeddings: int = 77,
        hidden_act: str = "quick_gelu",
        layer_norm_eps: float = 1e-5,
        eos_token_id: int = 49407,
    ) -> None:
        shape = (hidden_size, num_attention_heads, intermediate_size, num_hidden_layers, hidden_act, layer_norm_eps)
        self.text_model = CLIPTextTransformer(vocab_size, max_position_embeddings, eos_token_id, *shape)

    def forward(self, ids: Any) -> Tensor:
        """Integers (N, L), L up to max_position_embeddings, to hidden states (N, L, hidden_size).

        Raises ValueError for another shape, TypeError for other than integers, IndexError for one out of range.
        """
        return self.text_model(ids)

    def pooled(self, ids: Any) -> Tensor:
        """Integers (N, L) to the hidden state where each row's text ends, (N, hidden_size)."""
        return self.text_model.pooled(ids)


# ----------------------------------------------------------------------------------------------------------------- pictures


class _VisionEmbeddings(Module):
    def __init__(self, channels: int, image_size: int, patch_size: int, width: int) -> None:
        self.class_embedding = Parameter(init.normal((width,), width**-0.5))
        self.patch_embedding = Conv2d(channels, width, patch_size, stride=patch_size, bias=False)
        self.position_embedding = _embedding((image_size // patch_size) ** 2 + 1, width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, C) to (N, 1 + patches, width)."""
        patches = self.patch_embedding(x)
        n, h, w, width = patches.shape
        first = ops.broadcast_to(self.class_embedding, (n, 1, width))
        return ops.concat([first, ops.reshape(patches, (n, h * w, width))], 1) + self.position_embedding.weight


class CLIPVisionTransformer(Module):
    """Embeddings, a layer norm, layers, and a layer norm on the first token."""

    def __init__(self, shape: Sequence[int], patch_size: int, width: int, heads: int, inner: int, depth: int, *rest: Any) -> None:
        self.shape, self.width = tuple(shape), width
        self.embeddings = _VisionEmbeddings(shape[2], shape[0], patch_size, width)
        self.pre_layrnorm = LayerNorm(width, rest[-1])  # so in the files
        self.encoder = CLIPEncoder(width, heads, inner, depth, *rest)
        self.post_layernorm = LayerNorm(width, rest[-1])

    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, C) to (N, 1 + patches, width), before the last norm."""
        return self.encoder(self._embedded(x))

    def pooled(self, x: Tensor) -> Tensor:
        """(N, H, W, C) to (N, width)."""
        return self.post_layernorm(self.encoder.at(np.zeros(len(x), np.int64), self._embedded(x)))

    def _embedded(self, x: Tensor) -> Tensor:
        _check_pictures(x, self.shape)
        return self.pre_layrnorm(self.embeddings(x))


class CLIPVisionModel(_Published):
    """A picture's patches, and one token more, to a vector each; the additional token's stands for the picture.

    Args, as in the published configs:
        image_size, patch_size: pixels of a side; rows and columns left over by the patches are not looked at.
    Raises ValueError for values that are not supported.
    """

    def __init__(
        self,
        hidden_size: int = 768,
        intermediate_size: int = 3072,
        projection_dim: int = 512,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        num_channels: int = 3,
        image_size: int = 224,
        patch_size: int = 32,
        hidden_act: str = "quick_gelu",
        layer_norm_eps: float = 1e-5,
    ) -> None:
        if not 1 <= patch_size <= image_size:
            raise ValueError(f"CLIPVisionModel: patch_size={patch_size} must be from 1 to image_size={image_size}")
        shape = (hidden_size, num_attention_heads, intermediate_size, num_hidden_layers, hidden_act, layer_norm_eps)
        self.vision_model = CLIPVisionTransformer((image_size, image_size, num_channels), patch_size, *shape)

    def forward(self, x: Tensor) -> Tensor:
        """(N, image_size, image_size, num_channels) to hidden states (N, 1 + patches, hidden_size)."""
        return self.vision_model(x)

    def pooled(self, x: Tensor) -> Tensor:
        """(N, image_size, image_size, num_channels) to (N, hidden_size)."""
        return self.vision_model.pooled(x)


class ConvEncoder(Module):
    """Convolutions of stride 2 with a plain one after each; all that is left goes, place by place, into a linear layer."""

    def __init__(self, shape: Sequence[int], widths: Sequence[int], groups: int, width: int) -> None:
        channels = [shape[2], *widths]
        self.shape, self.width = tuple(shape), width
        self.down = ModuleList(Conv2d(a, b, 3, stride=2, padding=1) for a, b in zip(channels, widths))
        self.plain = ModuleList(Conv2d(b, b, 3, padding=1) for b in widths)
        self.norm_down = ModuleList(GroupNorm(groups, b, activation="silu") for b in widths)
        self.norm_plain = ModuleList(GroupNorm(groups, b, activation="silu") for b in widths)
        side = -(-shape[0] // 2 ** len(widths))
        self.out = Linear(side * side * widths[-1], width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, C) to (N, width)."""
        _check_pictures(x, self.shape)
        for down, norm_down, plain, norm_plain in zip(self.down, self.norm_down, self.plain, self.norm_plain):
            x = norm_down(down(x))
            x = norm_plain(plain(x))
        return ops.silu(self.out(ops.reshape(x, (x.shape[0], -1))))

    pooled = forward


class ConvVisionModel(_Published):
    """What CLIPVisionModel is for many and large pictures, for few and small ones: they teach a transformer too little.

    Above and below stay apart, since no mean is taken over places.

    Args:
        widths: channels at half size, a quarter, and so on.
        hidden_size: numbers of the result.
    """

    def __init__(
        self,
        hidden_size: int = 128,
        widths: Sequence[int] = (32, 64, 128),
        num_channels: int = 3,
        image_size: int = 64,
        norm_num_groups: int = 8,
        projection_dim: int = 64,
    ) -> None:
        self.vision_model = ConvEncoder((image_size, image_size, num_channels), widths, norm_num_groups, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(N, image_size, image_size, num_channels) to (N, hidden_size)."""
        return self.vision_model(x)

    pooled = forward


def _check_pictures(x: Tensor, shape: tuple[int, ...]) -> None:
    if x.shape[1:] != shape:
        raise ValueError(f"the picture encoder takes pictures (N, {', '.join(map(str, shape))}), not {x.shape}")


# --------------------------------------------------------------------------------------------------------------------- both


class CLIP(_Published):
    """A text encoder and a picture encoder, each with a projection to vectors of one size, and what their products are times.

    Args, as in the published configs:
        text_config: of CLIPTextModel.
        vision_config: of CLIPVisionModel; or, if it has `widths`, of ConvVisionModel.
        projection_dim: numbers of a vector.
        logit_scale_init_value: natural logarithm of what the cosines are multiplied by, at first.
    """

    def __init__(
        self,
        text_config: Mapping[str, Any],
        vision_config: Mapping[str, Any],
        projection_dim: int = 512,
        logit_scale_init_value: float = math.log(1 / 0.07),
    ) -> None:
        kind = ConvVisionModel if "widths" in vision_config else CLIPVisionModel
        self.text_model = CLIPTextModel.from_config(text_config).text_model
        self.vision_model: CLIPVisionTransformer | ConvEncoder = kind.from_config(vision_config).vision_model
        self.visual_projection = _projection(self.vision_model.width, projection_dim)
        self.text_projection = _projection(self.text_model.width, projection_dim)
        self.logit_scale = Parameter(init.constant((), logit_scale_init_value))

    def text_features(self, ids: Any) -> Tensor:
        """Token numbers (N, L) to vectors (N, projection_dim) of length 1."""
        return normalise(self.text_projection(self.text_model.pooled(ids)))

    def image_features(self, x: Tensor) -> Tensor:
        """Pictures (N, H, W, C) to vectors (N, projection_dim) of length 1."""
        return normalise(self.visual_projection(self.vision_model.pooled(x)))

    def forward(self, ids: Any, x: Tensor) -> Tensor:
        """Token numbers (N, L) and pictures (M, H, W, C) to logits (M, N): cosines times exp(logit_scale)."""
        cosines = ops.matmul(self.image_features(x), ops.transpose(self.text_features(ids), 0, 1))
        return cosines * ops.exp(self.logit_scale)

    def text_encoder(self) -> CLIPTextModel:
        """The text encoder as a model of its own, with the same parameters."""
        with no_init():
            model = CLIPTextModel.from_config(self.config["text_config"])
        model.text_model = self.text_model
        return model


def _projection(width: int, size: int) -> Linear:
    return _linear(width, size, width**-0.5, bias=False)


def normalise(x: Tensor) -> Tensor:
    """Vectors (N, size) brought to length 1."""
    return x * ops.rsqrt(ops.sum(x * x, axis=-1, keepdims=True))
