"""From a trained model to pictures: load a run, draw from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinydiff import io, models
from tinydiff.autograd import no_grad
from tinydiff.diffusion import KINDS, SCHEDULES, denoiser, guide, make_schedule, noise_source, sample
from tinydiff.images import grid, to_uint8
from tinydiff.names import choose
from tinydiff.nn import Module, no_init
from tinydiff.tensor import as_tensor

SHIPPED = Path(__file__).parent / "models" / "shipped"
NETWORKS: dict[str, Any] = {"denoiser": models.UNet2DModel, "classifier": models.Classifier, "autoencoder": models.AutoencoderKL}

# Samplers that walk in σ/α, or average slopes along it, must begin where there is something to see: at σ/α = 20,000, where the
# cosine schedule begins, heun in 10 steps gave an FID of 40 in place of the 2 of the others.
VISIBLE = {"subtract": 15.0, "heun": 80.0}


def crop(x: np.ndarray, border: int) -> np.ndarray:
    """Pictures (N, H, W, C) without `border` pixels on each side."""
    return x[:, border : x.shape[1] - border, border : x.shape[2] - border] if border else x


def model_folder(run: str | Path) -> Path:
    """Where the weights are: the `model` folder of a run, `run` itself if it holds weights, or a shipped model by its name.

    A folder that is called as a shipped model is "./digits".
    Raises ValueError when there are none.
    """
    if str(run) in ("digits", "classifier"):
        folder = SHIPPED / run
        if not folder.is_dir():
            raise ValueError(f"the shipped model {str(run)!r} is not part of this installation; train one with `tinydiff train`")
        return folder
    path = Path(run)
    for folder in (path / "model", path):
        if (folder / "model.safetensors").is_file():
            return folder
    if not path.exists():
        raise ValueError(f"{path}: no such run folder; make one with `tinydiff train denoiser --out {path}`, or use `digits`")
    raise ValueError(f"{path} holds no model yet; train one with `tinydiff train denoiser --out {path}`")


def check_card(card: dict[str, Any]) -> None:
    """Raise ValueError for a card that lacks something or holds nonsense, or asks for a network out of all proportion."""
    whole = {"shape": list, "class_names": list, "model": dict}
    if card.get("task") == "denoiser":
        whole |= {"schedule": str, "predict": str}
        choose(SCHEDULES, card.get("schedule", ""), "schedule")
        choose(KINDS, card.get("predict", ""), "kind of prediction")
    elif card.get("task") not in NETWORKS:
        raise ValueError(f"task is {card.get('task')!r}; expected one of {', '.join(NETWORKS)}")
    for name, kind in whole.items():
        if not isinstance(card.get(name), kind):
            raise ValueError(f"{name} is {card.get(name)!r}; expected a {kind.__name__}")
    shape = card["shape"]
    if len(shape) != 3 or not all(isinstance(size, int) and 0 < size <= 4096 for size in shape):
        raise ValueError(f"shape is {shape!r}; expected [height, width, channels]")
    if not isinstance(card.get("pad", 0), int) or not 0 <= card.get("pad", 0) <= 64:
        raise ValueError(f"pad is {card['pad']!r}; expected a number of pixels, 0 to 64")
    model, classes = card["model"], len(card["class_names"])
    limits = {"layers_per_block": 64, "block_out_channels": 8192, "widths": 8192, "latent_channels": 8192}
    for name, most in limits.items():
        sizes = model.get(name, 1)
        for size in sizes if isinstance(sizes, list | tuple) else [sizes]:
            if not isinstance(size, int) or not 1 <= size <= most:
                raise ValueError(f"model.{name} is {sizes!r}; expected nothing but 1 to {most}")
    if card["task"] == "denoiser" and model.get("num_class_embeds") not in (None, classes + 1):
        raise ValueError(
            f"model.num_class_embeds is {model['num_class_embeds']!r}; expected {classes + 1}, one more than classes"
        )
    if card["task"] == "classifier" and not model.get("num_classes", 0) >= classes:
        raise ValueError(f"model.num_classes is {model.get('num_classes')!r}; expected at least {classes}, the classes' number")


def load_model(run: str | Path, task: str | None = None, device: str = "cpu") -> tuple[Module, dict[str, Any]]:
    """The model of a run (or a shipped one, by name), ready to use, and its card. Raises ValueError if it is no `task`."""
    folder = model_folder(run)
    card = io.read_json(folder / "config.json")
    try:
        check_card(card)
        with no_init():
            model = NETWORKS[card["task"]].from_config(card["model"])
    except (ValueError, TypeError, ArithmeticError, LookupError, AttributeError) as error:
        raise ValueError(f"{folder / 'config.json'} describes no model: {error}") from error
    if task is not None and card["task"] != task:
        articles = {"autoencoder": "an"}
        held, needed = (f"{articles.get(kind, 'a')} {kind}" for kind in (card["task"], task))
        raise ValueError(f"{run} holds {held}, and {needed} is needed here")
    layouts = {name: parameter.layout for name, parameter in model.named_parameters()}
    weights = io.load_weights(folder / "model.safetensors")
    weights = {
        name: array.astype(np.float32, copy=False) for name, array in weights.items()
    }  # some are shipped in half precision
    model.load_state_dict({name: io.from_disk(name, array, layouts.get(name, "other")) for name, array in weights.items()})
    return model.to(device).requires_grad_(False).eval(), card


def weights_hash(model: Module) -> str:
    """A short hash of the weights as files hold them."""
    return io.hash_weights({name: io.to_disk(name, p.data, p.layout) for name, p in model.named_parameters()})


class Conditioned:
    """A denoiser with its card: draws what it is told, whatever kind of telling its subclass knows.

    Attributes:
        shape: (H, W, C) of the pictures.
    """

    def __init__(self, model: Module, card: dict[str, Any]) -> None:
        self.model, self.card = model, card
        self.shape: tuple[int, int, int] = tuple(card["shape"])
        self.schedule = make_schedule(card["schedule"])
        self.border: int = card.get("pad", 0)

    @property
    def hash(self) -> str:
        """A short hash of the weights."""
        return weights_hash(self.model)

    @property
    def size(self) -> tuple[int, int, int]:
        """(height, width, channels) of what the network denoises."""
        height, width, channels = self.shape
        return height + 2 * self.border, width + 2 * self.border, channels

    def _predict(self, x: np.ndarray, t: np.ndarray, condition: np.ndarray) -> np.ndarray:
        """The network's answer to x (N, …) at times t (N,), told `condition` (N, …)."""
        raise NotImplementedError

    def sample(
        self,
        condition: np.ndarray,
        null: Any,
        seeds: Sequence[int],
        *,
        sampler: str = "ddim",
        steps: int = 50,
        guidance: float = 2.0,
        eta: float | None = None,
        clip: float | None = 1.0,
        batch_size: int = 64,
        frames: list[np.ndarray] | None = None,
        callback: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """One picture a seed: uint8 (N, H, W, C). Picture i depends on condition[i] and seeds[i], not on its neighbours.

        `condition` (N, …) is what the network is told, `null` (…, or (N, …)) what it is guided away from. `eta` is ddim's.
        `frames` is filled with what there was at each step, noise first, and the result last, each (N, H, W, C) uint8.
        `callback(pictures)` is called after each step with how many went through it.
        Raises ValueError for options that make no sense.
        """
        if eta is not None and sampler != "ddim":
            raise ValueError(f"eta = {eta} is for the sampler ddim, not {sampler}")
        null = np.broadcast_to(np.asarray(null, condition.dtype), condition.shape)
        options: dict[str, Any] = {} if eta is None else {"eta": eta}
        if sampler in VISIBLE:
            options |= {
                "spacing": "karras",
                "spacing_options": {"sigma_max": min(VISIBLE[sampler], float(self.schedule.sigmas[-1]))},
            }
        drawn: list[np.ndarray] = []
        films: list[list[np.ndarray]] = []
        for start in range(0, len(seeds), batch_size):
            part = slice(start, start + batch_size)
            film: list[np.ndarray] = []

            def watch(step: int, t: float, x: np.ndarray, x0: np.ndarray, film: list[np.ndarray] = film) -> None:
                if frames is not None:
                    film.append(to_uint8(crop(x, self.border)))
                if callback is not None:
                    callback(len(x))

            predict = guide(self._predict, condition[part], null[part], guidance)
            denoise = denoiser(predict, self.schedule, self.card["predict"], clip)
            noise = noise_source(seeds[part], self.size)
            x = sample(sampler, denoise, noise, self.schedule, steps, callback=watch, **options)
            if not np.isfinite(x).all():
                raise ValueError(f"sampling gave numbers that are not finite; try other settings than {sampler} in {steps} steps")
            drawn.append(to_uint8(crop(x, self.border)))
            films.append([*film, drawn[-1]])
        if frames is not None:
            frames.extend(np.concatenate(parts) for parts in zip(*films))
        return np.concatenate(drawn) if drawn else np.zeros((0, *self.shape), np.uint8)


class Pipeline(Conditioned):
    """A denoiser that is told the class, or nothing.

    Attributes:
        class_names: what the classes are called; empty for a model without classes.
    """

    def __init__(self, model: Module, card: dict[str, Any]) -> None:
        super().__init__(model, card)
        self.class_names: list[str] = card["class_names"] if card["model"].get("num_class_embeds") else []

    @classmethod
    def load(cls, run: str | Path, device: str = "cpu") -> Pipeline:
        """From a run folder, or the shipped model `digits`; it computes on `device`."""
        return cls(*load_model(run, "denoiser", device))

    def _predict(self, x: np.ndarray, t: np.ndarray, condition: np.ndarray) -> np.ndarray:
        with no_grad():
            return self.model(as_tensor(x).to(self.model.device), t, condition if self.class_names else None).numpy()

    def draw(
        self, labels: Sequence[int] | np.ndarray | None, seeds: Sequence[int], *, guidance: float = 2.0, **settings: Any
    ) -> np.ndarray:
        """One picture a seed: uint8 (N, H, W, C), of class labels[i]; of any, without labels. `settings` are those of `sample`.

        Raises ValueError for labels that the model doesn't know, or of another number than the seeds.
        """
        seeds = list(seeds)
        if not self.class_names:
            if labels is not None:
                raise ValueError("this model was trained without classes; leave the class out")
            labels, guidance = np.zeros(len(seeds), np.int64), 1.0
        elif labels is None:
            labels = np.full(len(seeds), len(self.class_names))
            guidance = 1.0  # the null class itself: nothing to be guided towards
        labels = np.asarray(labels, np.int64)
        if len(labels) != len(seeds):
            raise ValueError(f"{len(labels)} labels for {len(seeds)} seeds; give one a picture")
        if labels.size and not 0 <= labels.min() <= labels.max() <= len(self.class_names):
            raise ValueError(f"classes are 0 to {len(self.class_names) - 1}; got {labels.min()} to {labels.max()}")
        return self.sample(labels, len(self.class_names), seeds, guidance=guidance, **settings)


def sample_labels(classes: Sequence[int], n: int) -> np.ndarray:
    """n labels spread evenly over `classes`, class after class; the first ones get what is left over."""
    counts = [n // len(classes) + (i < n % len(classes)) for i in range(len(classes))]
    return np.repeat(np.asarray(classes, np.int64), counts)


def sheet(pictures: np.ndarray, labels: np.ndarray | None, scale: int = 1) -> np.ndarray:
    """Pictures (N, H, W, C) as one: a row for each class if there are several, else about as wide as high."""
    if labels is None or len(np.unique(labels)) < 2:
        return grid(pictures, enlarged=scale)
    rows = [pictures[labels == label] for label in dict.fromkeys(labels.tolist())]
    columns = max(len(row) for row in rows)
    filled = np.zeros((len(rows), columns, *pictures.shape[1:]), np.uint8)
    for cells, row in zip(filled, rows):
        cells[: len(row)] = row
    return grid(filled.reshape(-1, *pictures.shape[1:]), columns, enlarged=scale)
