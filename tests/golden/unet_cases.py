"""Cases of golden/unet.json: small configs, and weights and inputs that follow from a name, so that only answers are stored."""

from __future__ import annotations

import math
import zlib
from typing import Any

import numpy as np

SMALL: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": SMALL,
    "two layers, four channels, one head": SMALL
    | {"layers_per_block": 2, "in_channels": 4, "out_channels": 4, "attention_head_dim": None},
    "three levels, attention on top": SMALL
    | {
        "down_block_types": ["AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D"],
        "block_out_channels": [8, 8, 16],
        "attention_head_dim": 4,
    },
    "classes": SMALL | {"num_class_embeds": 5, "in_channels": 1, "out_channels": 1},
    "sine first, shifted, eps, one-sided padding, time size": SMALL
    | {"flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6, "downsample_padding": 0, "time_embedding_dim": 24},
    "no attention in the middle": SMALL
    | {"add_attention": False, "down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2},
}
TIMES = [3.0, 871.0]


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A float32 parameter in the published layout, of a size that keeps activations near 1."""
    rng = np.random.default_rng(zlib.crc32(f"{name} {shape}".encode()))
    values = rng.standard_normal(shape)
    if len(shape) == 1:
        values = 0.2 * values + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
    else:
        values /= math.sqrt(math.prod(shape[1:]))
    return values.astype(np.float32)


def inputs(config: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """x (2, 8, 12, C) channels last, t (2,), and class labels (2,) if the config has classes."""
    x = np.random.default_rng(1).standard_normal((2, 8, 12, config["in_channels"])).astype(np.float32)
    return x, np.array(TIMES), np.array([4, 1]) if config.get("num_class_embeds") else None
