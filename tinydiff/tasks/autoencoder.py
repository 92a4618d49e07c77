"""Training an autoencoder."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar

from tinydiff import data, images, models, ops, random
from tinydiff.autograd import no_grad
from tinydiff.models.autoencoder import LECTURE, stage_table
from tinydiff.nn import Module
from tinydiff.pipeline import check_card, load_model
from tinydiff.reconstruction import fidelity, measure_latents, reconstruct, side_by_side
from tinydiff.tasks.base import CHECKPOINTING, Config, OnPictures
from tinydiff.tensor import Tensor, as_tensor


class AutoencoderTask(OnPictures):
    """An autoencoder: the same picture back out of few numbers. What is transparent in a picture lies on white.

    With a KL weight above 0 the bottleneck is Gaussian and its noise is drawn; with 0 it is plain, and logvar means nothing.
    """

    DEFAULTS: ClassVar[Config] = CHECKPOINTING | {
        "factor": 4,  # how many pixels of height, and of width, become one
        "latent": 4,  # channels of the latents
        "width": 16,  # channels at full size; twice as many at half, four times from a quarter on
        "kl": 1e-4,  # weight of the KL divergence, in nats by number in the picture
        "perceptual": 0.0,  # weight of the difference in the eyes of
        "classifier": "classifier",  # this one
    }
    PRESETS: ClassVar[dict[str, Config]] = {
        "small": {"model": {"layers_per_block": 1, "norm_num_groups": 8}},
        "base": {"width": 32, "model": {"layers_per_block": 2, "norm_num_groups": 8}},
        "lecture": {
            "factor": 8,
            "kl": 0.0,
            "model": {name: LECTURE[name] for name in ("block_out_channels", "layers_per_block", "norm_num_groups")},
        },
    }

    def __init__(self, config: Config, parts: Path | None = None) -> None:
        super().__init__(config, parts)
        for name in ("kl", "perceptual"):
            if not 0 <= config[name] < math.inf:
                raise ValueError(f"option {name} = {config[name]}: it is a weight, at least 0")
        if config["factor"] not in (1, 2, 4, 8, 16, 32, 64):
            raise ValueError(f"option factor = {config['factor']}: choose 1, 2, 4, 8, 16, 32 or 64")
        for name in ("latent", "width", "showings"):  # the latents are measured when the task shows what it can do
            if config[name] < 1:
                raise ValueError(f"option {name} = {config[name]}: it must be at least 1")
        self.test = data.load(config["data"], "test", config["size"]).images
        self.judge: Any = None
        if config["perceptual"]:
            self.judge, card = load_model(config["classifier"], "classifier")
            if card["shape"][2] != self.data.images.shape[3]:
                raise ValueError(
                    f"classifier {config['classifier']!r} sees {card['shape'][2]} channels and the pictures have "
                    f"{self.data.images.shape[3]}; train one on them, or leave perceptual at 0"
                )
        self.latents: Config = {}
        check_card(self.card())
        self.notes = (*self.notes, "the network\n" + stage_table(self.model_config(), *self.data.images.shape[1:3]))

    def card(self) -> Config:
        """See `Task`. Once `show` has measured the latents, the network's config has the factors that scale them."""
        factors = {name: self.latents[name] for name in ("scaling_factor", "shift_factor") if self.latents}
        return self.describe() | {"kl": self.config["kl"], "latents": self.latents, "model": self.model_config() | factors}

    def model_config(self) -> Config:
        """The network's configuration, its sizes taken from the data."""
        height, _, channels = self.data.images.shape[1:]
        levels = self.config["factor"].bit_length()
        return {
            "sample_size": height,
            "in_channels": channels,
            "out_channels": channels,
            "latent_channels": self.config["latent"],
            "block_out_channels": [self.config["width"] * min(2**i, 4) for i in range(levels)],
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
        } | self.config["model"]

    def build(self) -> Module:
        """See `Task`."""
        random.manual_seed(self.config["seed"])
        model = models.AutoencoderKL.from_config(self.model_config())
        model.gradient_checkpointing = self.config["gradient_checkpointing"]
        return model

    def loss(self, model: Module, step: int) -> Tensor:
        """Mean squared error of pixels in [-1, 1] + kl · divergence + perceptual · difference of what a classifier sees."""
        assert isinstance(model, models.AutoencoderKL)
        config, x = self.config, as_tensor(self.batch(step)[0]).to(model.device)
        latents = model.encode(x)
        back = model.decode(latents.sample(self.rng(step)) if config["kl"] else latents.mode(), x.shape[1:3])
        loss = ops.mse_loss(back, x)
        if config["kl"]:
            loss = loss + (config["kl"] / math.prod(x.shape[1:])) * ops.mean(latents.kl())
        if config["perceptual"]:
            loss = loss + config["perceptual"] * perceptual(self.judge.to(model.device), back, x)
        return loss

    def show(self, model: Module, step: int, folder: Path) -> dict[str, float]:
        """As `glance`, with figures of at most 500 test pictures; the latents of at most 2,000 training pictures are measured."""
        assert isinstance(model, models.AutoencoderKL)
        self.latents = measure_latents(model, self.data.images[:2000], sampled=self.config["kl"] > 0)
        self.glance(model, step, folder)
        pictures = self.test[:500]
        return fidelity(pictures, reconstruct(model, pictures)) | {"dead_channels": len(self.latents["dead"])}

    def glance(self, model: Module, step: int, folder: Path) -> None:
        """Test pictures above what came back of them."""
        assert isinstance(model, models.AutoencoderKL)
        pictures = self.test[:32]
        picture = side_by_side(pictures, reconstruct(model, pictures))
        images.save_png(folder / f"step-{step:06d}.png", picture, {"step": str(step)})


def perceptual(classifier: Any, x: Tensor, y: Tensor) -> Tensor:
    """How differently a classifier sees x and y: at each resolution and place the squared distance of its features, brought to
    length 1, averaged (as LPIPS without learned weights: Zhang et al. 2018)."""

    def directions(picture: Tensor) -> list[Tensor]:
        return [m * ops.rsqrt(ops.sum(m * m, axis=-1, keepdims=True) + 1e-8) for m in classifier.feature_maps(picture)]

    with no_grad():
        seen = directions(y)
    distances = [ops.mean(ops.sum((a - b) * (a - b), axis=-1)) for a, b in zip(directions(x), seen)]
    return ops.mean(ops.stack(distances))
