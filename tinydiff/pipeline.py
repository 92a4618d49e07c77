"""From a trained model to pictures: load a run, draw from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from tinydiff import io, models
from tinydiff.autograd import no_grad
from tinydiff.diffusion import KINDS, SCHEDULES, begin_with, denoiser, guide, keep, make_schedule, noise_source, sample
from tinydiff.images import grid
from tinydiff.names import choose
from tinydiff.nn import Module, no_init
from tinydiff.space import Latents, Pixels, Space
from tinydiff.tensor import as_tensor

AUTOENCODER = "autoencoder"  # the folder of what a denoiser's latents are decoded with, beside its weights
SHIPPED = Path(__file__).parent / "models" / "shipped"
NETWORKS: dict[str, Any] = {
    "denoiser": models.UNet2DModel,
    "text-to-image": models.UNet2DConditionModel,
    "classifier": models.Classifier,
    "autoencoder": models.AutoencoderKL,
    "clip": models.CLIP,
}

# Samplers that walk in σ/α, or average slopes along it, must begin where there is something to see: at σ/α = 20,000, where the
# cosine schedule begins, heun in 10 steps gave an FID of 40 in place of the 2 of the others.
VISIBLE = {"subtract": 15.0, "heun": 80.0}


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
    if card.get("task") in ("denoiser", "text-to-image"):
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
    if card["task"] == "text-to-image" and not isinstance(card.get("text"), str):
        raise ValueError(f"text is {card.get('text')!r}; expected the hash of the text encoder's weights")
    if not isinstance(card.get("autoencoder", ""), str):
        raise ValueError(f"autoencoder is {card['autoencoder']!r}; expected the hash of its weights")
    model, classes = card["model"], len(card["class_names"])
    limits = {"layers_per_block": 64, "block_out_channels": 8192, "widths": 8192, "latent_channels": 8192}
    limits |= {
        "hidden_size": 8192,
        "intermediate_size": 32768,
        "num_hidden_layers": 64,
        "projection_dim": 8192,
        "cross_attention_dim": 8192,
    }
    limits |= {"vocab_size": 2**20, "max_position_embeddings": 4096, "image_size": 4096}
    parts = [model, *(part for part in model.values() if isinstance(part, dict))]
    for name, most, part in ((name, most, part) for name, most in limits.items() for part in parts):
        sizes = part.get(name, 1)
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


def save_model(folder: Path, model: Module, card: dict[str, Any]) -> None:
    """Write a model's folder, as `load_model` reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    io.write_json(folder / "config.json", card)
    weights = _published(model)
    io.save_weights(folder / "model.safetensors", weights, {"hash": io.hash_weights(weights)})


def _published(model: Module) -> io.Weights:
    return {name: io.to_disk(name, p.data, p.layout) for name, p in model.named_parameters()}


def weights_hash(model: Module) -> str:
    """A short hash of the weights as files hold them."""
    return io.hash_weights(_published(model))


def load_space(run: str | Path, card: dict[str, Any], device: str = "cpu") -> Space:
    """Where the denoiser of a run works, by its card. Raises ValueError if its autoencoder is not the one that the card names."""
    shape = tuple(card["shape"])
    if card.get("autoencoder") is None:
        return Pixels(shape, card.get("pad", 0))
    folder = model_folder(run) / AUTOENCODER
    if not folder.is_dir():
        raise ValueError(
            f"{run} denoises latents, and their autoencoder is missing; it belongs in {folder}: copy the whole folder"
        )
    model, _ = load_model(folder, "autoencoder", device)
    if (found := weights_hash(model)) != card["autoencoder"]:
        raise ValueError(f"{folder} has the weights {found}, and the denoiser was trained with {card['autoencoder']}")
    return Latents(shape, cast(models.AutoencoderKL, model))


class Conditioned:
    """A denoiser with its card: draws what it is told, whatever kind of telling its subclass knows.

    Attributes:
        space: where it denoises; among pixels, if not given.
    """

    def __init__(self, model: Module, card: dict[str, Any], space: Space | None = None) -> None:
        self.model, self.card = model, card
        self.space = space or Pixels(tuple(card["shape"]), card.get("pad", 0))
        self.schedule = make_schedule(card["schedule"])

    @property
    def hash(self) -> str:
        """A short hash of the weights."""
        return weights_hash(self.model)

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
        picture: np.ndarray | None = None,
        strength: float = 1.0,
        mask: np.ndarray | None = None,
        noise: np.ndarray | None = None,
        batch_size: int = 64,
        frames: list[np.ndarray] | None = None,
        callback: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """One picture a seed: uint8 (N, H, W, C). Picture i depends on condition[i] and seeds[i], not on its neighbours.

        Args:
            condition: (N, …), what the network is told; null: (…, or (N, …)), what it is guided away from.
            seeds: of all that is random; N of them.
            eta: ddim's.
            picture: uint8 (H, W, C), to begin with: it is noised as far as `strength` says, from 0 (it stays) to 1 (it is
                forgotten; Meng et al. 2022).
            mask: (H, W), True where `picture` is to be drawn anew; elsewhere it stays, as well as the space can say it.
            noise: (N, *space.size), to begin with instead of the seeds' own.
            frames: is filled with what there was at each step, noise first, and the result last, each (N, H, W, C) uint8.
            callback: `callback(pictures)` is called after each step with how many went through it.

        Raises ValueError for options that make no sense.
        """
        if eta is not None and sampler != "ddim":
            raise ValueError(f"eta = {eta} is for the sampler ddim, not {sampler}")
        start, cover = self._given(picture, strength, mask)
        if noise is not None and noise.shape != (len(seeds), *self.space.size):
            raise ValueError(f"noise has shape {noise.shape}; {len(seeds)} seeds need {(len(seeds), *self.space.size)}")
        null = np.broadcast_to(np.asarray(null, condition.dtype), condition.shape)
        options: dict[str, Any] = {} if eta is None else {"eta": eta}
        if sampler in VISIBLE:
            options |= {
                "spacing": "karras",
                "spacing_options": {"sigma_max": min(VISIBLE[sampler], float(self.schedule.sigmas[-1]))},
            }
        drawn: list[np.ndarray] = []
        films: list[list[np.ndarray]] = []
        for first in range(0, len(seeds), batch_size):
            part = slice(first, first + batch_size)
            film: list[np.ndarray] = []

            def watch(step: int, t: float, x: np.ndarray, x0: np.ndarray, film: list[np.ndarray] = film) -> None:
                if frames is not None:
                    film.append(self.space.decode(x))
                if callback is not None:
                    callback(len(x))

            predict = guide(self._predict, condition[part], null[part], guidance)
            denoise = denoiser(predict, self.schedule, self.card["predict"], self.space.clip)
            if cover is not None and start is not None:
                denoise = keep(denoise, start, ~cover)
            if start is not None and strength < 1:
                options |= {"picture": np.repeat(start, len(seeds[part]), 0), "strength": strength}
            source = noise_source(seeds[part], self.space.size)
            if noise is not None:
                source = begin_with(noise[part], source)
            x = sample(sampler, denoise, source, self.schedule, steps, callback=watch, **options)
            if not np.isfinite(x).all():
                raise ValueError(f"sampling gave numbers that are not finite; try other settings than {sampler} in {steps} steps")
            drawn.append(self.space.decode(x))
            films.append([*film, drawn[-1]])
        if frames is not None:
            frames.extend(np.concatenate(parts) for parts in zip(*films))
        return np.concatenate(drawn) if drawn else np.zeros((0, *self.space.shape), np.uint8)

    def _given(
        self, picture: np.ndarray | None, strength: float, mask: np.ndarray | None
    ) -> tuple[np.ndarray | None, np.ndarray | None]:
        """A picture (1, *size) and a mask (h, w, 1) as the space has them."""
        if not 0 <= strength <= 1:
            raise ValueError(f"strength = {strength}; choose between 0 (keep the picture) and 1 (start from noise alone)")
        if picture is None:
            if mask is not None or strength != 1:
                raise ValueError("a mask or a strength below 1 needs a picture to start from")
            return None, None
        if picture.shape != self.space.shape or picture.dtype != np.uint8:
            raise ValueError(
                f"the picture is {picture.dtype} {picture.shape}, and this model draws uint8 {self.space.shape}; resize it"
            )
        if mask is not None and mask.shape != picture.shape[:2]:
            raise ValueError(f"the mask has shape {mask.shape} and the picture {picture.shape[:2]}; the two must agree")
        cover = None if mask is None else self.space.cover(np.asarray(mask, bool))
        return self.space.encode(picture[None]), cover


class Pipeline(Conditioned):
    """A denoiser that is told the class, or nothing.

    Attributes:
        class_names: what the classes are called; empty for a model without classes.
    """

    def __init__(self, model: Module, card: dict[str, Any], space: Space | None = None) -> None:
        super().__init__(model, card, space)
        self.class_names: list[str] = card["class_names"] if card["model"].get("num_class_embeds") else []

    @classmethod
    def load(cls, run: str | Path, device: str = "cpu") -> Pipeline:
        """From a run folder, or the shipped model `digits`; it computes on `device`."""
        model, card = load_model(run, "denoiser", device)
        return cls(model, card, load_space(run, card, device))

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
