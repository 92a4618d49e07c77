"""Training a denoiser."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np

from tinydiff import images, models, ops, random
from tinydiff.diffusion import DISTRIBUTIONS, KINDS, make_example, make_schedule
from tinydiff.names import choose
from tinydiff.nn import Module
from tinydiff.pipeline import Pipeline, check_card
from tinydiff.tasks.base import Config, OnPictures, check_share
from tinydiff.tensor import Tensor, as_tensor

UNET: Config = {
    "down_block_types": ["DownBlock2D", "DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
    "attention_head_dim": 32,
    "norm_num_groups": 8,
}


class DenoiserTask(OnPictures):
    """A UNet that predicts the noise in a picture (or v, or the picture itself), told the class of the picture or nothing."""

    DEFAULTS: ClassVar[Config] = {
        "schedule": "cosine",
        "predict": "v",
        "times": "uniform",  # how t is drawn
        "stratified": True,
        "min_snr": None,  # γ of min-SNR weighting
        "class_drop": 0.2,  # how often the class is withheld, for guidance
        "pad": 0,  # pixels of border added on each side
    }
    PRESETS: ClassVar[dict[str, Config]] = {
        "small": {"model": UNET | {"block_out_channels": [32, 64, 64], "layers_per_block": 1}},
        "base": {"model": UNET | {"block_out_channels": [64, 128, 128], "layers_per_block": 2}},
    }

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.schedule = make_schedule(config["schedule"])
        choose(KINDS, config["predict"], "kind of prediction")
        choose(DISTRIBUTIONS, config["times"], "distribution of t")
        check_share(config, "class_drop")
        if config["min_snr"] is not None and not config["min_snr"] > 0:
            raise ValueError(f"option min_snr = {config['min_snr']}: it must be positive (5 is usual)")
        self.classes = 0 if self.data.labels is None else self.data.num_classes
        check_card(self.card())

    def card(self) -> Config:
        """See `Task`."""
        names = ("schedule", "predict", "pad")
        return self.describe() | {name: self.config[name] for name in names} | {"model": self.model_config()}

    def model_config(self) -> Config:
        """The network's configuration, its sizes taken from the data."""
        height, _, channels = self.data.images.shape[1:]
        sizes = {"sample_size": height + 2 * self.config["pad"], "in_channels": channels, "out_channels": channels}
        return sizes | {"num_class_embeds": self.classes + 1 if self.classes else None} | self.config["model"]

    def build(self) -> Module:
        """See `Task`."""
        random.manual_seed(self.config["seed"])
        return models.UNet2DModel.from_config(self.model_config())

    def loss(self, model: Module, step: int) -> Tensor:
        """The mean squared error of the prediction at random noise levels; weighted per picture if min-SNR is on."""
        config, rng = self.config, self.rng(step)
        x0, labels = self.batch(step)
        if config["pad"]:
            border = (config["pad"], config["pad"])
            x0 = np.pad(x0, ((0, 0), border, border, (0, 0)), constant_values=-1.0)
        if labels is not None:
            labels = np.where(rng.random(len(x0)) < config["class_drop"], self.classes, labels)
        example = make_example(
            x0, rng, self.schedule, config["predict"], config["times"], config["stratified"], config["min_snr"]
        )
        predicted, target = model(as_tensor(example.x), example.t, labels), example.target
        if config["min_snr"] is not None:
            root = np.sqrt(example.weight)[:, None, None, None]
            predicted, target = predicted * as_tensor(root), target * root
        return ops.mse_loss(predicted, as_tensor(target))

    def show(self, model: Module, step: int, folder: Path) -> dict[str, float]:
        """A grid of drawn pictures, a row for each class."""
        pipeline = Pipeline(model, self.card())
        rows = max(self.classes, 1)
        labels = np.repeat(np.arange(rows), 8) if self.classes else None
        drawn = pipeline.draw(labels, range(8 * rows), sampler="dpmpp_2m", steps=20, guidance=2.0 if self.classes else 1.0)
        images.save_png(folder / f"step-{step:06d}.png", images.grid(drawn, columns=8, enlarged=2), {"step": str(step)})
        return {}
