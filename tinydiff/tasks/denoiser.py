"""Training a denoiser that is told the class of the picture, or nothing."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np

from tinydiff import images, models
from tinydiff.nn import Module
from tinydiff.pipeline import Pipeline, check_card
from tinydiff.tasks.base import Config, check_share
from tinydiff.tasks.denoising import Denoising, latent_unet

UNET: Config = {
    "down_block_types": ["DownBlock2D", "DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
    "attention_head_dim": 32,
    "norm_num_groups": 8,
}


class DenoiserTask(Denoising):
    """A UNet that predicts the noise in a picture (or v, or the picture itself), told the class of the picture or nothing."""

    NETWORK = models.UNet2DModel
    DEFAULTS: ClassVar[Config] = Denoising.DEFAULTS | {"class_drop": 0.2}  # how often the class is withheld, for guidance
    PRESETS: ClassVar[dict[str, Config]] = {
        "small": {"model": UNET | {"block_out_channels": [32, 64, 64], "layers_per_block": 1}},
        "base": {"model": UNET | {"block_out_channels": [64, 128, 128], "layers_per_block": 2}},
    }

    def __init__(self, config: Config, parts: Path | None = None) -> None:
        super().__init__(config, parts)
        check_share(config, "class_drop")
        self.classes = 0 if self.data.labels is None else self.data.num_classes
        check_card(self.card())

    def model_config(self) -> Config:
        """The network's configuration, its sizes taken from the data."""
        widths = self.LATENT_WIDTHS[self.config["preset"]]
        network = {} if self.autoencoder is None else latent_unet(self.space.size, widths)
        return network | {"num_class_embeds": self.classes + 1 if self.classes else None} | super().model_config()

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
