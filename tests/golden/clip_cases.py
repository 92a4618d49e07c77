"""Cases of golden/clip.json: small configs and inputs. Weights follow from their names, as in unet_cases.py."""

from __future__ import annotations

from typing import Any

import numpy as np

TEXT: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 9,
    "hidden_act": "quick_gelu",
    "eos_token_id": 39,
}
VISION: dict[str, Any] = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_channels": 3,
    "image_size": 13,
    "patch_size": 4,
    "hidden_act": "quick_gelu",
}
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"text_config": TEXT, "vision_config": VISION, "projection_dim": 6},
    "one layer, one head, eps, grey": {
        "text_config": TEXT | {"num_hidden_layers": 1, "num_attention_heads": 1, "layer_norm_eps": 1e-3},
        "vision_config": VISION
        | {"num_hidden_layers": 1, "num_attention_heads": 1, "layer_norm_eps": 1e-3, "num_channels": 1, "patch_size": 13},
        "projection_dim": 4,
    },
    "exact gelu, the end token of old configs": {
        "text_config": TEXT | {"hidden_act": "gelu", "eos_token_id": 2},
        "vision_config": VISION | {"hidden_act": "gelu", "image_size": 16},
        "projection_dim": 5,
    },
}


def inputs(config: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Token numbers (3, 9), the last one (the end) early, late and repeated as padding; pictures (2, side, side, channels)."""
    rng = np.random.default_rng(1)
    text, vision = config["text_config"], config["vision_config"]
    ids = rng.integers(3, text["vocab_size"] - 2, (3, text["max_position_embeddings"]))
    for row, end in zip(ids, (2, 8, 5)):
        row[end:] = text["vocab_size"] - 1
    side = vision["image_size"]
    return ids, rng.standard_normal((2, side, side, vision["num_channels"])).astype(np.float32)
