"""How good drawn pictures are, by the eye of a fixed classifier: do they look like real ones, and are they what was asked for?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tinydiff import data
from tinydiff.autograd import no_grad
from tinydiff.images import from_uint8, scale
from tinydiff.pipeline import Pipeline, load_model, sample_labels, weights_hash
from tinydiff.tensor import as_tensor

BATCH = 250
NEIGHBOURS = 3  # k of precision and recall, as in the paper


class Judge:
    """A classifier that looks at uint8 pictures (N, H, W, C). `classes` leaves out the one for "none of them"."""

    def __init__(self, model: Any, card: dict[str, Any]) -> None:
        self.model, self.card = model, card
        self.classes = len(card["class_names"])
        self.hash = weights_hash(model)

    @classmethod
    def load(cls, run: str | Path = "classifier", device: str = "cpu") -> Judge:
        """From a classifier's run folder; by default the shipped one, which is frozen. It computes on `device`."""
        return cls(*load_model(run, "classifier", device))

    def look(self, pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Features (N, F) float64, and classes (N,) int64. Square pictures are scaled to the size it knows.

        Raises ValueError for pictures with other channels or proportions.
        """
        known = tuple(self.card["shape"])
        square = known[0] == known[1] and pictures.shape[1] == pictures.shape[2]
        if pictures.shape[1:] != known and not (square and pictures.shape[3] == known[2]):
            raise ValueError(f"the classifier knows pictures of {known}, not {pictures.shape[1:]}")
        if pictures.shape[1:] != known:
            pictures = scale(pictures, known[0])
        features, classes = [], []
        for start in range(0, len(pictures), BATCH):
            with no_grad():
                seen = self.model.features(as_tensor(from_uint8(pictures[start : start + BATCH])).to(self.model.device))
                logits = self.model.head(seen).numpy()[:, : self.classes]
            features.append(seen.numpy().astype(np.float64))
            classes.append(logits.argmax(1))
        return np.concatenate(features), np.concatenate(classes)

    def accuracy(self, pictures: np.ndarray, labels: np.ndarray) -> float:
        """The share of pictures whose class it names as `labels` do."""
        return float(np.mean(self.look(pictures)[1] == labels))


def sqrt_trace(a: np.ndarray, b: np.ndarray) -> float:
    """tr (A·B)^½ of symmetric positive semi-definite A and B (F, F).

    By A^½ B A^½, which has the eigenvalues of A·B and is symmetric, so that `eigh` will do.
    """
    values, vectors = np.linalg.eigh(a)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    return float(np.sqrt(np.maximum(np.linalg.eigvalsh(root @ b @ root), 0)).sum())


def frechet_distance(x: np.ndarray, y: np.ndarray) -> float:
    """|μx − μy|² + tr(Σx + Σy − 2(ΣxΣy)^½) of features x (N, F) and y (M, F): FID (Heusel et al. 2017), here with features of
    this package's classifier. Figures compare only at equal N and with the same classifier. Raises ValueError for N or M < 2.
    """
    if len(x) < 2 or len(y) < 2:
        raise ValueError(f"FID needs at least two pictures on each side, not {len(x)} and {len(y)}")
    difference = x.mean(0) - y.mean(0)
    covariance_x, covariance_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    return float(
        difference @ difference + np.trace(covariance_x) + np.trace(covariance_y) - 2 * sqrt_trace(covariance_x, covariance_y)
    )


def squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(N, M) from x (N, F) and y (M, F)."""
    return np.maximum((x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * x @ y.T, 0)


def precision(x: np.ndarray, y: np.ndarray) -> float:
    """The share of x (N, F) that lies within the k-th neighbour's distance of some y (M, F) (Kynkäänniemi et al. 2019).

    With drawn pictures as x and real ones as y it is the precision; the other way round, the recall.
    """
    among = squared_distances(y, y)
    radius = np.sort(among, axis=1)[:, min(NEIGHBOURS, len(y) - 1)]  # the nearest is the point itself
    return float((squared_distances(x, y) <= radius).any(1).mean())


def real_pictures(spec: str, size: int | None, n: int) -> tuple[data.Dataset, np.ndarray, np.ndarray]:
    """(the training set, which of it to compare with, n other real pictures): from the test set if it has n, else held out."""
    train, test = data.load(spec, size=size), data.load(spec, "test", size)
    if len(test) >= n:
        chosen = np.random.default_rng(0).permutation(len(test))[:n]
        return train, np.arange(len(train)), test.images[chosen]
    if len(train) < 2 * n:
        raise ValueError(
            f"n = {n}: {spec} has {len(test)} test and {len(train)} training pictures; choose at most {len(train) // 2}"
        )
    order = np.random.default_rng(0).permutation(len(train))
    return train, order[n:], train.images[order[:n]]


def evaluate_denoiser(run: str | Path, n: int, judge: Judge, spec: str | None = None, **settings: Any) -> dict[str, Any]:
    """Draw n pictures, spread over the classes, and judge them. `settings` go to `Pipeline.draw`.

    Gives fid, and floor: the FID of as many real pictures, which no model can be expected to pass; accuracy: the share whose
    class the judge names as asked for (None without classes), and accuracy_real; precision and recall.
    """
    pipeline = Pipeline.load(run, judge.model.device)
    spec = spec or pipeline.card["data"]
    train, kept, others = real_pictures(spec, pipeline.card.get("size"), n)
    judge.look(others[:1])  # refuses data of another shape before the long part
    labels = sample_labels(range(len(pipeline.class_names)), n) if pipeline.class_names else None
    drawn = pipeline.draw(labels, range(n), **settings)
    features, classes = judge.look(drawn)
    reference, reference_classes = judge.look(train.images[kept])
    floor_features, _ = judge.look(others)
    some = np.random.default_rng(0).permutation(len(reference))[:n]
    accuracy_real = None if train.labels is None else float(np.mean(reference_classes == train.labels[kept]))
    return {
        "task": "denoiser",
        "n": n,
        "fid": frechet_distance(features, reference),
        "floor": frechet_distance(floor_features, reference),
        "accuracy": None if labels is None else float(np.mean(classes == labels)),
        "accuracy_real": accuracy_real,
        "precision": precision(features, reference[some]),
        "recall": precision(reference[some], features),
        "data": spec,
        "weights": pipeline.hash,
        "classifier": judge.hash,
    }


def evaluate_classifier(run: str | Path, n: int | None = None, spec: str | None = None, device: str = "cpu") -> dict[str, Any]:
    """Accuracy on the test set (its first n pictures, if given)."""
    judge = Judge.load(run, device)
    spec = spec or judge.card["data"]
    test = data.load(spec, "test", judge.card.get("size"))
    if test.labels is None:
        raise ValueError(f"data {spec!r} has no labels to compare with")
    images, labels = test.images[:n], test.labels[:n]
    return {
        "task": "classifier",
        "n": len(images),
        "accuracy": judge.accuracy(images, labels),
        "data": spec,
        "weights": judge.hash,
    }
