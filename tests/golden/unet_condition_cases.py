"""Cases of golden/unet_condition.json: small configs and inputs. Weights follow from their names, as in unet_cases.py."""

from __future__ import annotations

from typing import Any

import numpy as np

SMALL: dict[str, Any] = {
    "sample_size": 8,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 6,
    "attention_head_dim": 2,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": SMALL,
    "three levels, two layers, three channels": SMALL
    | {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "block_out_channels": [8, 8, 16],
        "layers_per_block": 2,
    },
    "heads by level, two transformer blocks below": SMALL
    | {
        "down_block_types": ["CrossAttnDownBlock2D"] * 2,
        "up_block_types": ["CrossAttnUpBlock2D"] * 2,
        "attention_head_dim": [1, 4],
        "transformer_layers_per_block": [1, 2],
    },
    "linear projections, eight inputs": SMALL | {"use_linear_projection": True, "in_channels": 8},
    "sine first, shifted, eps, one-sided padding, time size, classes": SMALL
    | {
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
        "downsample_padding": 0,
        "time_embedding_dim": 24,
        "num_class_embeds": 5,
    },
}
TIMES = [3.0, 871.0]


def inputs(config: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """x (2, 6, 8, C) channels last, t (2,), context (2, 7, width), and class labels (2,) if the config has classes."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, 6, 8, config.get("in_channels", 4))).astype(np.float32)
    context = rng.standard_normal((2, 7, config["cross_attention_dim"])).astype(np.float32)
    return x, np.array(TIMES), context, np.array([4, 1]) if config.get("num_class_embeds") else None
