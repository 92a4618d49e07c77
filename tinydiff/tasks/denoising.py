"""What the tasks that train denoisers share: the noise, the loss, and what their cards say of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from tinydiff import ops
from tinydiff.diffusion import DISTRIBUTIONS, KINDS, make_example, make_schedule
from tinydiff.names import choose
from tinydiff.nn import Module
from tinydiff.tasks.base import Config, OnPictures
from tinydiff.tensor import Tensor, as_tensor


class Denoising(OnPictures):
    """Practising to remove noise from pictures, told something of each. A subclass says what it is told, and by which network."""

    DEFAULTS: ClassVar[Config] = {
        "schedule": "cosine",
        "predict": "v",
        "times": "uniform",  # how t is drawn
        "stratified": True,
        "min_snr": None,  # γ of min-SNR weighting
        "pad": 0,  # pixels of border added on each side
    }

    def __init__(self, config: Config, parts: Path | None = None) -> None:
        super().__init__(config, parts)
        self.schedule = make_schedule(config["schedule"])
        choose(KINDS, config["predict"], "kind of prediction")
        choose(DISTRIBUTIONS, config["times"], "distribution of t")
        if config["min_snr"] is not None and not config["min_snr"] > 0:
            raise ValueError(f"option min_snr = {config['min_snr']}: it must be positive (5 is usual)")

    def model_config(self) -> Config:
        """The network's configuration, its sizes taken from the data."""
        height, _, channels = self.data.images.shape[1:]
        sizes = {"sample_size": height + 2 * self.config["pad"], "in_channels": channels, "out_channels": channels}
        return sizes | self.config["model"]

    def card(self) -> Config:
        """See `Task`."""
        names = ("schedule", "predict", "pad")
        return self.describe() | {name: self.config[name] for name in names} | {"model": self.model_config()}

    def told(self, step: int, rng: np.random.Generator) -> Any:
        """What the network hears of the pictures of step `step`: (N, …), or None."""
        raise NotImplementedError

    def loss(self, model: Module, step: int) -> Tensor:
        """The mean squared error of the prediction at random noise levels; weighted per picture if min-SNR is on."""
        config, rng = self.config, self.rng(step)
        x0 = self.batch(step)[0]
        if config["pad"]:
            border = (config["pad"], config["pad"])
            x0 = np.pad(x0, ((0, 0), border, border, (0, 0)), constant_values=-1.0)
        told = self.told(step, rng)
        example = make_example(
            x0, rng, self.schedule, config["predict"], config["times"], config["stratified"], config["min_snr"]
        )
        predicted, target = model(as_tensor(example.x).to(model.device), example.t, told), example.target
        if config["min_snr"] is not None:
            root = np.sqrt(example.weight)[:, None, None, None]
            predicted, target = predicted * as_tensor(root).to(model.device), target * root
        return ops.mse_loss(predicted, as_tensor(target).to(model.device))
