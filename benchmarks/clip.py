"""Contrastive training: a step of the small preset, and of a vision transformer in place of the convolutions."""

from __future__ import annotations

from typing import Any

import numpy as np

import tinydiff as td
from benchmarks.harness import Bench, Case, Side
from benchmarks.train import our_updates, torch_updates
from tinydiff.contrastive import contrastive_loss
from tinydiff.tasks.clip import CONV, TEXT, VIT

TARGET = 1.5
VOCAB, LENGTH = 800, 16


def config(size: int, vision: dict[str, Any]) -> dict[str, Any]:
    """Of RGB pictures of size × size."""
    return {
        "text_config": TEXT | {"vocab_size": VOCAB, "eos_token_id": VOCAB - 1, "max_position_embeddings": LENGTH},
        "vision_config": vision | {"image_size": size, "num_channels": 3},
        "projection_dim": 64,
    }


def build(settings: dict[str, Any]) -> td.models.CLIP:
    """Ours, the same for the same config."""
    td.manual_seed(0)
    return td.models.CLIP.from_config(settings)


def batch(n: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """n pictures, and captions of full length, so that both sides compute as much."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, VOCAB - 2, (n, LENGTH))
    ids[:, -1] = VOCAB - 1
    return rng.uniform(-1, 1, (n, size, size, 3)).astype(np.float32), ids


def twin(model: td.models.CLIP, layout: Any) -> Any:
    """The same network in PyTorch: a function of pictures (N, C, H, W) and ids to both vectors; and its parameters."""
    import torch
    from torch.nn import functional as F

    from tinydiff import io

    w = {n: torch.nn.Parameter(torch.from_numpy(io.to_disk(n, p.data, p.layout).copy())) for n, p in model.named_parameters()}
    for parameter in w.values():
        if parameter.ndim == 4:
            parameter.data = parameter.data.to(memory_format=layout)

    def linear(x: Any, name: str) -> Any:
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def norm(x: Any, name: str) -> Any:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])

    def encoder(x: Any, name: str, part: Any, heads: int, causal: bool) -> Any:
        for i in range(len(part.encoder.layers)):
            at = f"{name}.encoder.layers.{i}"
            y = norm(x, f"{at}.layer_norm1")
            q, k, v = (linear(y, f"{at}.self_attn.{p}_proj").unflatten(-1, (heads, -1)).transpose(1, 2) for p in ("q", "k", "v"))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)
            x = x + linear(y, f"{at}.self_attn.out_proj")
            y = linear(norm(x, f"{at}.layer_norm2"), f"{at}.mlp.fc1")
            x = x + linear(y * torch.sigmoid(1.702 * y), f"{at}.mlp.fc2")
        return x

    text, vision = model.config["text_config"], model.config["vision_config"]

    def seen_by_convolutions(x: Any) -> Any:
        at = "vision_model"
        for i in range(len(vision["widths"])):
            for kind, stride in (("down", 2), ("plain", 1)):
                x = F.conv2d(x, w[f"{at}.{kind}.{i}.weight"], w[f"{at}.{kind}.{i}.bias"], stride, 1)
                scale, shift = w[f"{at}.norm_{kind}.{i}.weight"], w[f"{at}.norm_{kind}.{i}.bias"]
                x = F.silu(F.group_norm(x, vision["norm_num_groups"], scale, shift))
        return F.silu(linear(x.permute(0, 2, 3, 1).flatten(1), f"{at}.out"))

    def seen_by_transformer(x: Any) -> Any:
        at = "vision_model"
        patches = (
            F.conv2d(x, w[f"{at}.embeddings.patch_embedding.weight"], stride=vision["patch_size"]).flatten(2).transpose(1, 2)
        )
        first = w[f"{at}.embeddings.class_embedding"].expand(len(x), 1, -1)
        y = torch.cat([first, patches], 1) + w[f"{at}.embeddings.position_embedding.weight"]
        y = encoder(norm(y, f"{at}.pre_layrnorm"), at, model.vision_model, vision["num_attention_heads"], False)
        return norm(y[:, 0], f"{at}.post_layernorm")

    def forward(x: Any, ids: Any) -> tuple[Any, Any]:
        y = F.embedding(ids, w["text_model.embeddings.token_embedding.weight"])
        y = y + w["text_model.embeddings.position_embedding.weight"][: ids.shape[1]]
        y = encoder(y, "text_model", model.text_model, text["num_attention_heads"], True)
        said = linear(norm(y, "text_model.final_layer_norm")[:, -1], "text_projection")
        seen = linear((seen_by_convolutions if "widths" in vision else seen_by_transformer)(x), "visual_projection")
        return F.normalize(seen, dim=-1), F.normalize(said, dim=-1)

    return forward, w


def step_case(bench: Bench, name: str, n: int, size: int, vision: dict[str, Any]) -> Case:
    """A training step: the contrastive loss; then clipping, AdamW, moving average."""
    x, ids = batch(n, size)
    settings = config(size, vision)

    def ours() -> Side:
        model, pictures = build(settings), td.from_numpy(x)
        update = our_updates(model.parameters())

        def step() -> float:
            return update(contrastive_loss(model.image_features(pictures), model.text_features(ids), model.logit_scale))

        return Side(step, lambda loss: [np.array([loss, step(), step()])])

    def theirs(layout: Any) -> Side:
        from benchmarks.twin import channels_first

        torch = bench.torch
        forward, parameters = twin(build(settings), layout)
        pictures, tokens = channels_first(x).to(memory_format=layout), torch.from_numpy(ids)
        own = torch.arange(n)
        update = torch_updates(list(parameters.values()))

        def step() -> float:
            seen, said = forward(pictures, tokens)
            logits = seen @ said.T * parameters["logit_scale"].exp()
            cross_entropy = torch.nn.functional.cross_entropy
            return update(0.5 * (cross_entropy(logits, own) + cross_entropy(logits.T, own)))

        return Side(step, lambda loss: [np.array([loss, step(), step()])])

    against = {}
    if bench.torch:
        formats = {"contiguous": bench.torch.contiguous_format, "channels_last": bench.torch.channels_last}
        against = {key: theirs(layout) for key, layout in formats.items()}
    title = f"training step, {name} at {size}×{size}, batch {n}"
    return Case("clip", title, ours(), against, TARGET, counted=True, tolerance=1e-3)


def run(bench: Bench) -> None:
    """The suite."""
    for size in (32,) if bench.settings.quick else (32, 64):
        bench.run(step_case(bench, "convolutions", 128, size, CONV))
    bench.run(step_case(bench, "vision transformer", 128, 32, VIT))
