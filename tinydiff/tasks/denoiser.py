"""Training a denoiser that is told the class of the picture, or nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from tinydiff import images, models, random
from tinydiff.nn import Module
from tinydiff.pipeline import Pipeline, check_card
from tinydiff.tasks.base import Config, check_share
from tinydiff.tasks.denoising import Denoising

UNET: Config = {
    "down_block_types": ["DownBlock2D", "DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
    "attention_head_dim": 32,
    "norm_num_groups": 8,
}


def latent_unet(size: tuple[int, int, int], widths: list[int]) -> Config:
    """The UNet for latents (h, w, c): few places and many channels, so two levels do up to 16 × 16; attention at the last."""
    levels = min(len(widths), 2 if max(size[:2]) <= 16 else 3)
    return {
        "block_out_channels": widths[:levels],
        "down_block_types": ["DownBlock2D"] * (levels - 1) + ["AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D"] + ["UpBlock2D"] * (levels - 1),
        "attention_head_dim": 32,
        "norm_num_groups": 8,
    }


class DenoiserTask(Denoising):
    """A UNet that predicts the noise in a picture (or v, or the picture itself), told the class of the picture or nothing."""

    DEFAULTS: ClassVar[Config] = Denoising.DEFAULTS | {"class_drop": 0.2}  # how often the class is withheld, for guidance
    PRESETS: ClassVar[dict[str, Config]] = {
        "small": {"model": UNET | {"block_out_channels": [32, 64, 64], "layers_per_block": 1}},
        "base": {"model": UNET | {"block_out_channels": [64, 128, 128], "layers_per_block": 2}},
    }
    LATENT_WIDTHS: ClassVar[dict[str, list[int]]] = {"small": [128, 128, 128], "base": [128, 256, 256]}

    @classmethod
    def presets(cls, options: Mapping[str, Any]) -> dict[str, Config]:
        """See `Task`. Of a UNet among latents, only the depth is settled before their size is known."""
        if options.get("latents") is None:
            return cls.PRESETS
        return {
            name: {"model": {"layers_per_block": preset["model"]["layers_per_block"]}} for name, preset in cls.PRESETS.items()
        }

    def __init__(self, config: Config, parts: Path | None = None) -> None:
        super().__init__(config, parts)
        check_share(config, "class_drop")
        self.classes = 0 if self.data.labels is None else self.data.num_classes
        check_card(self.card())

    def model_config(self) -> Config:
        """The network's configuration, its sizes taken from the data."""
        network = {} if self.autoencoder is None else latent_unet(self.space.size, self.LATENT_WIDTHS[self.config["preset"]])
        return network | {"num_class_embeds": self.classes + 1 if self.classes else None} | super().model_config()

    def build(self) -> Module:
        """See `Task`."""
        random.manual_seed(self.config["seed"])
        return models.UNet2DModel.from_config(self.model_config())

    def told(self, step: int, rng: np.random.Generator) -> np.ndarray | None:
        """Labels (N,), some of them withheld; None for data without classes."""
        if self.data.labels is None:
            return None
        labels = self.data.labels[self.indices(step)]
        return np.where(rng.random(len(labels)) < self.config["class_drop"], self.classes, labels)

    def show(self, model: Module, step: int, folder: Path) -> dict[str, float]:
        """A grid of drawn pictures, a row for each class."""
        pipeline = Pipeline(model, self.card(), self.space)
        rows = max(self.classes, 1)
        labels = np.repeat(np.arange(rows), 8) if self.classes else None
        drawn = pipeline.draw(labels, range(8 * rows), sampler="dpmpp_2m", steps=20, guidance=2.0 if self.classes else 1.0)
        images.save_png(folder / f"step-{step:06d}.png", images.grid(drawn, columns=8, enlarged=2), {"step": str(step)})
        return {}
