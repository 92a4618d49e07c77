"""Cases of golden/autoencoder.json: small configs and inputs. Weights follow from their names, as in unet_cases.py."""

from __future__ import annotations

from typing import Any

import numpy as np


def _config(widths: list[int], **others: Any) -> dict[str, Any]:
    n = len(widths)
    types = {"down_block_types": ["DownEncoderBlock2D"] * n, "up_block_types": ["UpDecoderBlock2D"] * n}
    return types | {"block_out_channels": widths, "norm_num_groups": 4} | others


CONFIGS: dict[str, dict[str, Any]] = {
    "colour": _config([8, 16]),
    "one level, grey, latents of one channel": _config([8], in_channels=1, out_channels=1, latent_channels=1),
    "three levels, two layers, four channels": _config(
        [4, 8, 8], in_channels=4, out_channels=4, layers_per_block=2, latent_channels=3, norm_num_groups=2
    ),
    "no 1×1 convolutions, no attention": _config(
        [8, 8], use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False
    ),
    "the lecture's widths": _config([3, 6, 12, 24], norm_num_groups=3),
}


def inputs(config: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Pictures x (2, 8, 16, C) and latents z (2, 8 / factor, 16 / factor, latent channels), channels last."""
    rng, factor = np.random.default_rng(1), 2 ** (len(config["block_out_channels"]) - 1)
    x = rng.standard_normal((2, 8, 16, config.get("in_channels", 3))).astype(np.float32)
    z = rng.standard_normal((2, 8 // factor, 16 // factor, config.get("latent_channels", 4))).astype(np.float32)
    return x, z
