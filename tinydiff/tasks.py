"""What to train: everything that differs from one kind of model to another. The loop that trains them all is in `train`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from tinydiff import __version__, data, images, models, ops, random
from tinydiff.augment import jitter
from tinydiff.autograd import no_grad
from tinydiff.diffusion import DISTRIBUTIONS, KINDS, add_noise, make_example, make_schedule
from tinydiff.models.autoencoder import LECTURE, stage_table
from tinydiff.names import choose
from tinydiff.nn import Module
from tinydiff.pipeline import Pipeline, check_card, load_model
from tinydiff.reconstruction import fidelity, measure_latents, reconstruct, side_by_side
from tinydiff.tensor import Tensor, as_tensor

Config = dict[str, Any]

COMMON: Config = {
    "data": "digits",  # what `tinydiff.data.load` takes
    "size": None,  # of a folder's pictures
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

# What the options that are None by default look like otherwise.
EXAMPLES: Config = {"size": 28, "steps": 1000, "min_snr": 5.0}

UNET: Config = {
    "down_block_types": ["DownBlock2D", "DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
    "attention_head_dim": 32,
    "norm_num_groups": 8,
}


class Task(Protocol):
    """A model, its data and its loss. Randomness comes from (seed, step) alone, so that a run can stop and go on anywhere."""

    config: Config
    notes: tuple[str, ...]  # what the user should hear of the data

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


def configure(task: str, preset: str = "small", options: Mapping[str, Any] | None = None) -> Config:
    """The configuration of a run: the task's defaults, the preset, then `options` ("model.KEY" reaches into the network's).

    Raises ValueError for an unknown task, preset or option, or a value of the wrong kind.
    """
    chosen = choose(TASKS, task, "task")
    config: Config = {"task": task, "preset": preset, **COMMON, **chosen.DEFAULTS, "model": {}}
    config |= choose(chosen.PRESETS, preset, f"preset of {task}")
    config["model"] = dict(config["model"])
    for name, value in (options or {}).items():
        if name.startswith("model."):
            config["model"][name.removeprefix("model.")] = value
            continue
        like = EXAMPLES.get(name, choose(config, name, f"option of {task}"))
        if not (_same_kind(like, value) or (value is None and name in EXAMPLES)):
            raise ValueError(f"option {name} = {value!r}: it should be like {like!r}")
        config[name] = value
    for name in ("batch_size", "lr", "clip", "minutes" if config["steps"] is None else "steps"):
        if not 0 < config[name] < math.inf:
            raise ValueError(f"option {name} = {config[name]}: it must be positive")
    if config["seed"] < 0:
        raise ValueError(f"option seed = {config['seed']}: it must be at least 0")
    return config


def _same_kind(before: Any, value: Any) -> bool:
    if isinstance(before, list):
        return isinstance(value, list) and len(value) == len(before) and all(map(_same_kind, before, value))
    if isinstance(before, float):
        return isinstance(value, float | int) and not isinstance(value, bool)
    return isinstance(value, type(before)) and isinstance(value, bool) == isinstance(before, bool)


def _check_share(config: Config, name: str) -> None:
    if not 0 <= config[name] <= 1:
        raise ValueError(f"option {name} = {config[name]}: it is a share; choose between 0 and 1")


def make_task(config: Config) -> Task:
    """The task that a configuration describes, with its data loaded. Raises ValueError for one that lacks something."""
    chosen = choose(TASKS, config.get("task", ""), "task")
    missing = [name for name in {**COMMON, **chosen.DEFAULTS, "model": {}} if name not in config]
    if missing:
        raise ValueError(f"the configuration of this run lacks {', '.join(missing)}; was it made by another version?")
    return chosen(config)


class _OnPictures:
    """What the tasks on (N, H, W, C) pictures with labels share: data, batches and randomness by step."""

    DEFAULTS: ClassVar[Config] = {}
    PRESETS: ClassVar[dict[str, Config]] = {}

    def __init__(self, config: Config) -> None:
        self.config = config
        self.data = data.load(config["data"], size=config["size"])
        self.notes = self.data.notes

    def rng(self, step: int, purpose: int = 0) -> np.random.Generator:
        """The random generator of one step (`purpose` tells several apart)."""
        return np.random.default_rng([self.config["seed"], step, purpose])

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Pictures in [-1, 1] (N, H, W, C) float32 and labels (N,) of step `step`."""
        config = self.config
        index = data.batch_indices(len(self.data.images), config["batch_size"], config["seed"], step)
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


class DenoiserTask(_OnPictures):
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
        _check_share(config, "class_drop")
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


class ClassifierTask(_OnPictures):
    """A network that says which class a picture is of, and how much it is one at all.

    With "not_a_digit" there is one class more, and a part of every batch is noised: x_t = α·x_0 + σ·ε is to be class k with
    probability α² and "nothing" with σ². So log P rises all the way from noise to a digit, and its gradient leads there.
    """

    DEFAULTS: ClassVar[Config] = {"not_a_digit": True, "noisy": 0.3, "augment": True, "schedule": "cosine"}
    PRESETS: ClassVar[dict[str, Config]] = {"small": {"model": {}}, "base": {"model": {}}}

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if self.data.labels is None:
            raise ValueError(f"data {config['data']!r} has no labels; a classifier needs them")
        self.schedule = make_schedule(config["schedule"])
        _check_share(config, "noisy")
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
            return ops.cross_entropy(model(as_tensor(x)), labels)
        t = rng.uniform(0, self.schedule.timesteps - 1, len(x))
        noised = rng.random(len(x)) < config["noisy"]
        alpha, sigma = np.where(noised, self.schedule.alpha(t), 1.0), np.where(noised, self.schedule.sigma(t), 0.0)
        x = add_noise(x, rng.standard_normal(x.shape, dtype=np.float32), alpha, sigma)
        target = np.zeros((len(x), self.classes + 1), np.float32)
        target[np.arange(len(x)), labels] = alpha**2
        target[:, -1] = sigma**2
        return ops.cross_entropy(model(as_tensor(x)), as_tensor(target))

    def show(self, model: Module, step: int, folder: Path) -> dict[str, float]:
        """The share of at most 2,000 test pictures that it names rightly."""
        from tinydiff.evaluate import Judge

        test = data.load(self.config["data"], split="test", size=self.config["size"])
        assert test.labels is not None  # the training set has some
        return {"accuracy": Judge(model, self.card()).accuracy(test.images[:2000], test.labels[:2000])}


class AutoencoderTask(_OnPictures):
    """An autoencoder: the same picture back out of few numbers. What is transparent in a picture lies on white.

    With a KL weight above 0 the bottleneck is Gaussian and its noise is drawn; with 0 it is plain, and logvar means nothing.
    """

    DEFAULTS: ClassVar[Config] = {
        "factor": 4,  # how many pixels of height, and of width, become one
        "latent": 4,  # channels of the latents
        "width": 16,  # channels at full size; twice as many at half, four times from a quarter on
        "kl": 1e-4,  # weight of the KL divergence, in nats by number in the picture
        "perceptual": 0.0,  # weight of the difference in the eyes of
        "classifier": "classifier",  # this one
        "gradient_checkpointing": False,  # a third more time for far less memory
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

    def __init__(self, config: Config) -> None:
        super().__init__(config)
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
        config, x = self.config, as_tensor(self.batch(step)[0])
        latents = model.encode(x)
        back = model.decode(latents.sample(self.rng(step)) if config["kl"] else latents.mode(), x.shape[1:3])
        loss = ops.mse_loss(back, x)
        if config["kl"]:
            loss = loss + (config["kl"] / math.prod(x.shape[1:])) * ops.mean(latents.kl())
        if config["perceptual"]:
            loss = loss + config["perceptual"] * perceptual(self.judge, back, x)
        return loss

    def show(self, model: Module, step: int, folder: Path) -> dict[str, float]:
        """Test pictures above what came back of them; and the latents of at most 2,000 training pictures are measured."""
        assert isinstance(model, models.AutoencoderKL)
        self.latents = measure_latents(model, self.data.images[:2000], sampled=self.config["kl"] > 0)
        pictures = self.test[:500]
        back = reconstruct(model, pictures)
        images.save_png(folder / f"step-{step:06d}.png", side_by_side(pictures[:32], back[:32]), {"step": str(step)})
        return fidelity(pictures, back) | {"dead_channels": len(self.latents["dead"])}


def perceptual(classifier: Any, x: Tensor, y: Tensor) -> Tensor:
    """How differently a classifier sees x and y: at each resolution and place the squared distance of its features, brought to
    length 1, averaged (as LPIPS without learned weights: Zhang et al. 2018)."""

    def directions(picture: Tensor) -> list[Tensor]:
        return [m * ops.rsqrt(ops.sum(m * m, axis=-1, keepdims=True) + 1e-8) for m in classifier.feature_maps(picture)]

    with no_grad():
        seen = directions(y)
    distances = [ops.mean(ops.sum((a - b) * (a - b), axis=-1)) for a, b in zip(directions(x), seen)]
    return ops.mean(ops.stack(distances))


TASKS: dict[str, type[DenoiserTask] | type[ClassifierTask] | type[AutoencoderTask]] = {
    "denoiser": DenoiserTask,
    "classifier": ClassifierTask,
    "autoencoder": AutoencoderTask,
}
