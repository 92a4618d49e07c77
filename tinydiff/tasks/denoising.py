"""What the tasks that train denoisers share: the space they work in, the noise, the loss, and what their cards say of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np

from tinydiff import models, ops, random
from tinydiff.diffusion import DISTRIBUTIONS, KINDS, make_example, make_schedule
from tinydiff.models.unet import UNet
from tinydiff.names import choose
from tinydiff.nn import Module
from tinydiff.pipeline import AUTOENCODER, load_model, save_model, weights_hash
from tinydiff.space import Latents, Pixels, Space, cached_moments
from tinydiff.tasks.base import CHECKPOINTING, Config, OnPictures
from tinydiff.tensor import Tensor, as_tensor

ATTENDED = 8  # the longest side of a map whose places all look at the words


def latent_unet(size: tuple[int, int, int], widths: list[int], attention: str = "Attn") -> Config:
    """The UNet for latents (h, w, c): few places and many channels, so two levels do up to 16 × 16.

    Attention is at the last level. Words ("CrossAttn") are looked at on every map of up to 8 × 8: they say what is to be where.
    """
    side = max(size[:2])
    levels = min(len(widths), 2 if side <= 16 else 3)
    attends = [level == levels - 1 or (attention == "CrossAttn" and side <= ATTENDED << level) for level in range(levels)]
    kinds = [attention if here else "" for here in attends]
    return {
        "block_out_channels": widths[:levels],
        "down_block_types": [f"{kind}DownBlock2D" for kind in kinds],
        "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(kinds)],
        # in the one kind of UNet the size of a head, in the other their number
        "attention_head_dim": 32 if attention == "Attn" else 4,
        "norm_num_groups": 8,
    }


class Denoising(OnPictures):
    """Practising to remove noise from pictures, told something of each. A subclass says what it is told, and by which network.

    With `latents`, the run of an autoencoder, it is the latents that are noised. They are encoded once, before training; where
    the autoencoder's bottleneck is Gaussian each step draws them anew.
    """

    DEFAULTS: ClassVar[Config] = CHECKPOINTING | {
        "schedule": "cosine",
        "predict": "v",
        "times": "uniform",  # how t is drawn
        "stratified": True,
        "min_snr": None,  # γ of min-SNR weighting
        "pad": 0,  # pixels of border added on each side
        "latents": None,  # run of the autoencoder whose latents to denoise, in place of pixels
    }

    NETWORK: ClassVar[type[UNet]]
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
        self.schedule = make_schedule(config["schedule"])
        choose(KINDS, config["predict"], "kind of prediction")
        choose(DISTRIBUTIONS, config["times"], "distribution of t")
        if config["min_snr"] is not None and not config["min_snr"] > 0:
            raise ValueError(f"option min_snr = {config['min_snr']}: it must be positive (5 is usual)")
        self.space: Space
        self.autoencoder: Config | None = None  # its card
        if config["latents"] is None:
            self.space = Pixels(self.data.images.shape[1:], config["pad"])
        else:
            self._encode(config["latents"] if parts is None else parts / AUTOENCODER)

    def _encode(self, run: str | Path) -> None:
        if self.config["pad"]:
            raise ValueError(f"option pad = {self.config['pad']}: it is for pixels; leave it at 0 with latents")
        model, self.autoencoder = load_model(run, "autoencoder")
        self.space = Latents(self.data.images.shape[1:], cast(models.AutoencoderKL, model))
        self.weights = weights_hash(model)
        self.mean, self.std = cached_moments(self.space, self.data.images, self.weights)
        if not np.isfinite(self.mean).all():
            raise ValueError(f"the latents of {run} are not finite: the autoencoder has diverged; train it again")

    def store(self, folder: Path) -> None:
        """See `Task`: the autoencoder, so that the run can draw on its own."""
        if self.autoencoder is not None and isinstance(self.space, Latents):
            save_model(folder / AUTOENCODER, self.space.model, self.autoencoder)

    def clean(self, step: int) -> np.ndarray:
        """What the noise of step `step` is added to: (N, *space.size) float32."""
        index = self.indices(step)
        if self.autoencoder is None:
            return self.space.encode(self.data.images[index])
        if not self.autoencoder["kl"]:
            return self.mean[index]
        return self.mean[index] + self.std[index] * self.rng(step, 1).standard_normal(self.mean[index].shape, np.float32)

    def model_config(self) -> Config:
        """The network's configuration, its sizes taken from the data."""
        height, _, channels = self.space.size
        return {"sample_size": height, "in_channels": channels, "out_channels": channels} | self.config["model"]

    def build(self) -> Module:
        """See `Task`."""
        random.manual_seed(self.config["seed"])
        model = self.NETWORK.from_config(self.model_config())
        model.gradient_checkpointing = self.config["gradient_checkpointing"]
        return model

    def card(self) -> Config:
        """See `Task`."""
        own = {name: self.config[name] for name in ("schedule", "predict", "pad")}
        if self.autoencoder is not None:
            own["autoencoder"] = self.weights
        return self.describe() | own | {"model": self.model_config()}

    def told(self, step: int, rng: np.random.Generator) -> Any:
        """What the network hears of the pictures of step `step`: (N, …), or None."""
        raise NotImplementedError

    def loss(self, model: Module, step: int) -> Tensor:
        """The mean squared error of the prediction at random noise levels; weighted per picture if min-SNR is on."""
        config, rng = self.config, self.rng(step)
        told = self.told(step, rng)
        example = make_example(
            self.clean(step), rng, self.schedule, config["predict"], config["times"], config["stratified"], config["min_snr"]
        )
        predicted, target = model(as_tensor(example.x).to(model.device), example.t, told), example.target
        if config["min_snr"] is not None:
            root = np.sqrt(example.weight)[:, None, None, None]
            predicted, target = predicted * as_tensor(root).to(model.device), target * root
        return ops.mse_loss(predicted, as_tensor(target).to(model.device))
