"""Training a classifier."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np

from tinydiff import data, models, ops, random
from tinydiff.augment import jitter
from tinydiff.diffusion import add_noise, make_schedule
from tinydiff.nn import Module
from tinydiff.pipeline import check_card
from tinydiff.tasks.base import Config, OnPictures, check_share
from tinydiff.tensor import Tensor, as_tensor


class ClassifierTask(OnPictures):
    """A network that says which class a picture is of, and how much it is one at all.

    With "not_a_digit" there is one class more, and a part of every batch is noised: x_t = α·x_0 + σ·ε is to be class k with
    probability α² and "nothing" with σ². So log P rises all the way from noise to a digit, and its gradient leads there.
    """

    DEFAULTS: ClassVar[Config] = {"not_a_digit": True, "noisy": 0.3, "augment": True, "schedule": "cosine"}
    PRESETS: ClassVar[dict[str, Config]] = {"small": {"model": {}}, "base": {"model": {}}}

    def __init__(self, config: Config, parts: Path | None = None) -> None:
        super().__init__(config, parts)
        if self.data.labels is None:
            raise ValueError(f"data {config['data']!r} has no labels; a classifier needs them")
        self.schedule = make_schedule(config["schedule"])
        check_share(config, "noisy")
        self.classes = self.data.num_classes
        check_card(self.card())

    def card(self) -> Config:
        """See `Task`."""
        return self.describe() | {"not_a_digit": self.config["not_a_digit"], "model": self.model_config()}

    def model_config(self) -> Config:
        """The network's configuration, its sizes taken from the data."""
        outputs = self.classes + bool(self.config["not_a_digit"])
        return {"in_channels": self.data.images.shape[-1], "num_classes": outputs} | self.config["model"]

    def build(self) -> Module:
        """See `Task`."""
        random.manual_seed(self.config["seed"])
        return models.Classifier.from_config(self.model_config())

    def loss(self, model: Module, step: int) -> Tensor:
        """Cross-entropy with the classes, or with what is left of them under the noise."""
        config, rng = self.config, self.rng(step)
        x, labels = self.batch(step)
        if config["augment"]:
            x = jitter(x, rng)
        if not config["not_a_digit"]:
            return ops.cross_entropy(model(as_tensor(x).to(model.device)), labels)
        t = rng.uniform(0, self.schedule.timesteps - 1, len(x))
        noised = rng.random(len(x)) < config["noisy"]
        alpha, sigma = np.where(noised, self.schedule.alpha(t), 1.0), np.where(noised, self.schedule.sigma(t), 0.0)
        x = add_noise(x, rng.standard_normal(x.shape, dtype=np.float32), alpha, sigma)
        target = np.zeros((len(x), self.classes + 1), np.float32)
        target[np.arange(len(x)), labels] = alpha**2
        target[:, -1] = sigma**2
        return ops.cross_entropy(model(as_tensor(x).to(model.device)), as_tensor(target).to(model.device))

    def show(self, model: Module, step: int, folder: Path) -> dict[str, float]:
        """The share of at most 2,000 test pictures that it names rightly."""
        from tinydiff.evaluate import Judge

        test = data.load(self.config["data"], split="test", size=self.config["size"])
        assert test.labels is not None  # the training set has some
        return {"accuracy": Judge(model, self.card()).accuracy(test.images[:2000], test.labels[:2000])}
