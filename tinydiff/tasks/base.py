"""What every task has, and what those on pictures share."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from tinydiff import __version__, data, images
from tinydiff.data.captions import Captions
from tinydiff.nn import Module
from tinydiff.tensor import Tensor
from tinydiff.tokenizer import Tokenizer, Truncation

Config = dict[str, Any]
SOME = 1000  # captions that are looked at for their length

COMMON: Config = {
    "data": "digits",  # what `tinydiff.data.load` takes
    "size": None,  # height and width of the pictures, if other than the data has or suggests
    "seed": 0,
    "steps": None,  # how long to train; if None,
    "minutes": 10.0,  # as many as fit
    "showings": 4,  # how often it shows what it can do by now
    "batch_size": 64,
    "lr": 2e-3,
    "betas": [0.9, 0.99],
    "weight_decay": 0.01,
    "warmup": 100,  # steps; at most a tenth of all
    "clip": 1.0,  # of the gradient's norm
    "ema": 0.999,  # decay of the averaged weights, which are the ones kept
}
CHECKPOINTING: Config = {"gradient_checkpointing": False}  # a third more time for far less memory; of the large networks


class Task(Protocol):
    """A model, its data and its loss. Randomness comes from (seed, step) alone, so that a run can stop and go on anywhere."""

    DEFAULTS: ClassVar[Config]  # its own options, beside those of COMMON

    @classmethod
    def presets(cls, options: Mapping[str, Any]) -> dict[str, Config]:
        """The presets to choose from, given the user's options."""
        ...

    config: Config
    notes: tuple[str, ...]  # what the user should hear of the data

    def __init__(self, config: Config, parts: Path | None = None) -> None: ...

    def store(self, folder: Path) -> None:
        """Write to the model's folder what it needs beside its weights, and is not trained: once, before the first step."""
        ...

    def build(self) -> Module:
        """The untrained model, the same for the same seed."""
        ...

    def loss(self, model: Module, step: int) -> Tensor:
        """The loss of step `step`'s batch: a tensor of one element."""
        ...

    def card(self) -> Config:
        """What is kept beside the weights: all that is needed to use the model."""
        ...

    def show(self, model: Module, step: int, folder: Path) -> dict[str, float]:
        """Write to `folder` what the model can do by now, and return figures of merit."""
        ...

    @property
    def epoch(self) -> float:
        """How many steps see all of the data once."""
        ...

    def glance(self, model: Module, step: int, folder: Path) -> None:
        """Write to `folder` what can be seen of the model for the price of a step; done after every epoch."""
        ...


class OnPictures:
    """What the tasks on (N, H, W, C) pictures with labels share: data, batches and randomness by step.

    `parts` is where `store` wrote, for a run that goes on: other runs that it was made from may be gone by then.
    """

    DEFAULTS: ClassVar[Config] = {}
    PRESETS: ClassVar[dict[str, Config]] = {}

    @classmethod
    def presets(cls, options: Mapping[str, Any]) -> dict[str, Config]:
        """See `Task`."""
        return cls.PRESETS

    def __init__(self, config: Config, parts: Path | None = None) -> None:
        self.config = config
        self.data = data.load(config["data"], size=config["size"])
        self.notes = self.data.notes

    def rng(self, step: int, purpose: int = 0) -> np.random.Generator:
        """The random generator of one step (`purpose` tells several apart)."""
        return np.random.default_rng([self.config["seed"], step, purpose])

    def store(self, folder: Path) -> None:
        """See `Task`: most models need nothing."""

    def indices(self, step: int) -> np.ndarray:
        """Which pictures step `step` sees: (N,)."""
        return data.batch_indices(len(self.data.images), self.config["batch_size"], self.config["seed"], step)

    @property
    def epoch(self) -> float:
        """See `Task`."""
        return len(self.data.images) / self.config["batch_size"]

    def glance(self, model: Module, step: int, folder: Path) -> None:
        """See `Task`: most models are only shown."""

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Pictures in [-1, 1] (N, H, W, C) float32 and labels (N,) of step `step`."""
        index = self.indices(step)
        labels = None if self.data.labels is None else self.data.labels[index]
        return images.from_uint8(self.data.images[index]), labels

    def describe(self) -> Config:
        """What every model's card says of its data."""
        return {
            "task": self.config["task"],
            "version": __version__,
            "data": self.config["data"],
            "size": self.config["size"],
            "shape": list(self.data.images.shape[1:]),
            "class_names": list(self.data.class_names),
        }


def check_share(config: Config, name: str) -> None:
    """Refuse an option that is no share. Raises ValueError."""
    if not 0 <= config[name] <= 1:
        raise ValueError(f"option {name} = {config[name]}: it is a share; choose between 0 and 1")


def notes_on_length(captions: Captions, tokenizer: Tokenizer) -> tuple[str, ...]:
    """What the user should hear of captions whose ends are dropped: a note, or none if all of them fit."""
    some = captions.every()[:SOME]
    cut = [caption for caption in some if tokenizer.dropped(caption)]
    if not cut:
        return ()
    what = f"{len(cut)} of {len(some)} captions have more than the text encoder's {tokenizer.length - 2} tokens, such as"
    return (f"{what} {cut[0]!r}; what is too much is not heard",)


@contextmanager
def cut_silently() -> Iterator[None]:
    """A block, or function, in which captions are cut without a warning each: `notes_on_length` has told of them once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Truncation)
        yield
