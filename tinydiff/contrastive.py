"""Vectors of pictures and of captions that meet: the loss that teaches them to, and what they are good for once they do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinydiff import data, ops
from tinydiff.autograd import no_grad
from tinydiff.data.shapes import candidates, parse
from tinydiff.images import from_uint8, read_image
from tinydiff.models import CLIP
from tinydiff.pipeline import load_model, model_folder, weights_hash
from tinydiff.tensor import Tensor, as_tensor
from tinydiff.tokenizer import Tokenizer

TOKENIZER = "tokenizer"  # folder beside the weights, as in the published layout
MOST_SCALE = math.log(100)  # of the logit scale, as in the paper
MASKED = -1e30
BATCH = 250
RANKS = (1, 5, 10)
AMONG = 200  # pictures that captions are looked for among, and as many captions


# --------------------------------------------------------------------------------------------------------------------- loss


def same_pairs(said: Sequence[Sequence[str]], captions: Sequence[str]) -> np.ndarray:
    """(N, M) bool: whether caption j is one of the things that may be said of picture i."""
    kinds: dict[tuple[str, ...], np.ndarray] = {}
    for group in map(tuple, said):
        if group not in kinds:
            true = set(group)
            kinds[group] = np.array([caption in true for caption in captions])
    return np.stack([kinds[tuple(group)] for group in said])


def contrastive_loss(images: Tensor, texts: Tensor, scale: Tensor, same: np.ndarray | None = None) -> Tensor:
    """How badly pictures pick their captions out of the batch and captions their pictures (Radford et al. 2021), in nats.

    Args:
        images, texts: vectors (N, size) and (M, size) of length 1; row i of both belongs together, and texts from N on belong to
            no picture: they are there to be mistaken (Yuksekgonul et al. 2023).
        scale: logarithm of what the cosines are multiplied by; above ln 100 it counts as that.
        same: bool (N, M), `same_pairs`; such pairs off the diagonal are neither right nor wrong: they are left out.
    The mean of the cross-entropies of both directions; ln N for vectors that say nothing, if M = N, without repetitions.
    """
    logits = ops.matmul(images, ops.transpose(texts, 0, 1)) * ops.exp(ops.minimum(scale, MOST_SCALE))
    n = logits.shape[0]
    if same is not None:
        aside = Tensor(same & ~np.eye(n, logits.shape[1], dtype=bool)).to(logits.device)
        logits = ops.where(aside, MASKED, logits)
    own = np.arange(n)
    return 0.5 * (ops.cross_entropy(logits, own) + ops.cross_entropy(ops.transpose(logits[:, :n], 0, 1), own))


def guessing(same: np.ndarray) -> float:
    """The loss of vectors that say nothing: half ln N and half ln M, less where pairs are left out."""
    n, m = same.shape
    among = [np.log(m + 1 - same.sum(1)), np.log(n + 1 - same[:, :n].sum(0))]
    return float(np.mean(among))


# ----------------------------------------------------------------------------------------------------------------- matching


class Matcher:
    """A trained pair of encoders with their tokeniser: how well captions fit pictures.

    Attributes:
        shape: (H, W, C) of the pictures.
    """

    def __init__(self, model: CLIP, tokenizer: Tokenizer, card: dict[str, Any]) -> None:
        self.model, self.tokenizer, self.card = model, tokenizer, card
        self.shape: tuple[int, int, int] = tuple(card["shape"])

    @classmethod
    def load(cls, run: str | Path, device: str = "cpu") -> Matcher:
        """From a run folder of `tinydiff train clip`; it computes on `device`. Raises ValueError for one of something else."""
        model, card = load_model(run, "clip", device)
        assert isinstance(model, CLIP)
        length = model.text_model.length
        return cls(model, Tokenizer.load(model_folder(run) / TOKENIZER, length), card)

    @property
    def hash(self) -> str:
        """A short hash of the weights."""
        return weights_hash(self.model)

    def read(self, path: str | Path) -> np.ndarray:
        """A picture file as uint8 (H, W, C), scaled and cropped to the size that the encoder takes."""
        return read_image(path, self.shape[0], self.shape[2])

    def images(self, pictures: np.ndarray) -> np.ndarray:
        """uint8 (N, H, W, C) to vectors (N, size) of length 1."""
        parts = []
        for start in range(0, len(pictures), BATCH):
            with no_grad():
                x = as_tensor(from_uint8(pictures[start : start + BATCH])).to(self.model.device)
                parts.append(self.model.image_features(x).numpy())
        return np.concatenate(parts)

    def texts(self, captions: Sequence[str]) -> np.ndarray:
        """N captions to vectors (N, size) of length 1. Warns of what doesn't fit."""
        parts = []
        for start in range(0, len(captions), BATCH):
            with no_grad():
                parts.append(self.model.text_features(self.tokenizer(captions[start : start + BATCH])).numpy())
        return np.concatenate(parts)

    def scores(self, pictures: np.ndarray, captions: Sequence[str]) -> np.ndarray:
        """Cosines (N, M) of N pictures, uint8 (N, H, W, C), with M captions."""
        return self.images(pictures) @ self.texts(captions).T


def zero_shot(matcher: Matcher, pictures: np.ndarray, labels: np.ndarray, phrasings: Sequence[Sequence[str]]) -> dict[str, float]:
    """The share of pictures whose class has the nearest caption, among as many phrasings of each class.

    accuracy: by the mean vector of each class's phrasings. accuracy_one_phrasing: by one phrasing, the mean over all of them.
    """
    seen = matcher.images(pictures)
    count = min(map(len, phrasings))
    said = np.stack([matcher.texts(group[:count]) for group in phrasings], 1)  # (phrasing, class, size)
    each = [float(np.mean((seen @ vectors.T).argmax(1) == labels)) for vectors in said]
    together = float(np.mean((seen @ said.mean(0).T).argmax(1) == labels))
    return {"accuracy": together, "accuracy_one_phrasing": float(np.mean(each)), "accuracy_worst_phrasing": min(each)}


def ranks(scores: np.ndarray, own: np.ndarray) -> np.ndarray:
    """From scores (N, M), pictures by captions: the place (N,), 1 being the best, of caption own[i] at picture i."""
    return (scores >= scores[np.arange(len(own)), own][:, None]).sum(1)  # an equal score of another counts against it


def recalls(scores: np.ndarray) -> dict[str, float]:
    """From scores (N, N), pictures by captions: the share of pictures whose own caption is among the best 1, 5 and 10."""
    places = ranks(scores, np.arange(len(scores)))
    return {f"recall_{rank}": float(np.mean(places <= rank)) for rank in RANKS}


def retrieval_of_shapes(matcher: Matcher, test: data.Dataset, n: int, among: int = 100) -> float:
    """The share of n pictures that pick their own caption from `among` of the same wording, false in one word or two."""
    assert test.captions is not None
    count = min(n, len(test))
    seen = matcher.images(test.images[:count])
    right = 0
    for index in range(count):
        scene = parse(test.captions[index][0])
        said = matcher.texts(candidates(scene, np.random.default_rng([index, 0x5C]), among))
        right += int((said @ seen[index]).argmax()) == 0
    return right / count


def one_each(found: data.Dataset, n: int, seed: int = 0) -> tuple[np.ndarray, list[str]]:
    """Pictures, uint8, that mean different things, at most n of them, and a caption of each."""
    assert found.captions is not None
    first = np.unique(found.captions.meaning, return_index=True)[1]
    index = np.sort(np.random.default_rng(seed).permutation(first)[:n])
    return found.images[index], found.captions.draw(index, seed, 0)


def retrieval(matcher: Matcher, found: data.Dataset, n: int, seed: int = 0) -> dict[str, float]:
    """`recalls` of n pictures that mean different things, each with one of its captions."""
    pictures, captions = one_each(found, n, seed)
    return {"among": len(captions)} | recalls(matcher.scores(pictures, captions))


def measure(matcher: Matcher, spec: str, size: int | None, n: int) -> dict[str, Any]:
    """What pictures and captions held out of training tell of a matcher, by the kind of data.

    Of data with classes, `zero_shot`; of shapes, `retrieval_of_shapes`; of other captioned pictures `retrieval` among 200 of the
    training pictures, moved and turned as never in training ("renderings"), and of the test's, whose names were never met.
    """
    from tinydiff.augment import jitter

    test = data.load(spec, "test", size)
    if test.captions is None:
        raise ValueError(f"data {spec!r} has no captions")
    if test.labels is not None:
        return {"n": len(test.images[:n])} | zero_shot(matcher, test.images[:n], test.labels[:n], test.captions.phrasings)
    if spec.partition(":")[0] == "shapes":
        return {"n": min(n, len(test)), "among": 100, "accuracy": retrieval_of_shapes(matcher, test, n)}
    train = data.load(spec, "train", size)
    x = from_uint8(train.images)
    moved = jitter(x, np.random.default_rng(0xE7A1), background=background(train.images))
    rendered = data.Dataset(np.rint((moved + 1) * 127.5).clip(0, 255).astype(np.uint8), None, spec, captions=train.captions)
    n = min(n, AMONG)
    found = retrieval(matcher, rendered, n) | {f"plain_{k}": v for k, v in retrieval(matcher, train, n).items() if k != "among"}
    if not np.array_equal(test.images, train.images):
        found |= {f"unseen_{name}": value for name, value in retrieval(matcher, test, n).items()}
    return found


def background(images: np.ndarray) -> float:
    """What lies around pictures, uint8 (N, H, W, C): the median of the first thousand's borders, in [-1, 1]."""
    some = images[:1000]
    border = np.concatenate([some[:, [0, -1]].reshape(-1), some[:, :, [0, -1]].reshape(-1)])
    return float(np.median(border) / 127.5 - 1)


def evaluate_clip(run: str | Path, n: int, spec: str | None = None, device: str = "cpu") -> dict[str, Any]:
    """`measure` of a run, on what it was trained on unless `spec` says otherwise."""
    matcher = Matcher.load(run, device)
    chosen = spec or matcher.card["data"]
    size = matcher.card["size"] if spec is None else None
    return {"task": "clip"} | measure(matcher, chosen, size, n) | {"data": chosen, "weights": matcher.hash}
