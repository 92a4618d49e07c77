"""f(x), how much is this a digit? Change the pixels by f's gradient, and noise or a messy picture becomes one.

The gradient by the pixels takes one backward pass. By finite differences it takes an evaluation a pixel and more:
`pixel_gradients` computes both ways and compares.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np

from tinydiff import ops
from tinydiff.autograd import grad, no_grad
from tinydiff.evaluate import Judge
from tinydiff.images import from_uint8, read_image, to_uint8
from tinydiff.models import Classifier
from tinydiff.nn import no_init
from tinydiff.tensor import Tensor, tensor

Callback = Callable[[int, float], None]
AT_ONCE = 98  # perturbed pictures a forward pass
COPIES = 8  # noisy copies that a gradient is averaged over
NOISE = (1.0, 0.3)  # σ of their noise, at the start and at the end
BLUR = (2.0, 0.5)  # standard deviation in pixels of the gradient's blur, likewise


@dataclass(frozen=True)
class Dream:
    """What came of a start.

    Attributes:
        pictures: uint8 (steps + 1, H, W, C), the start first.
        probabilities: P(class | picture), of as many.
    """

    pictures: np.ndarray
    probabilities: list[float]


def start_picture(judge: Judge, picture: str | Path | None = None, seed: int = 0) -> np.ndarray:
    """Where to start: a picture file of any size, scaled and cropped, or noise. (H, W, C) float32 in [-1, 1].

    A picture that is mostly bright is taken for ink on paper and inverted: the classifier learned from bright strokes on black.
    """
    height, width, channels = judge.card["shape"]
    if picture is None:
        return np.clip(np.random.default_rng(seed).standard_normal((height, width, channels), np.float32), -1, 1)
    if height != width:
        raise ValueError(f"the classifier looks at pictures of {height}×{width}; only square ones can be read from a file")
    pixels = from_uint8(read_image(picture, height, channels))
    return -pixels if pixels.mean() > 0 and channels == 1 else pixels


def log_probability(judge: Judge, x: Tensor, target: int) -> Tensor:
    """log P(target | x) of pictures x (N, H, W, C): (N,). "None of them" competes, if the classifier knows it."""
    return ops.log_softmax(judge.model(x), -1)[:, target]


def _blur(size: int, std: float) -> np.ndarray:
    """The matrix (size, size), float32, that blurs a row of pixels by a Gaussian; its rows sum to 1."""
    distance = np.arange(size)[:, None] - np.arange(size)
    weights = np.exp(-((distance / std) ** 2) / 2)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def dream(
    judge: Judge,
    target: int,
    start: np.ndarray,
    steps: int = 200,
    rate: float = 0.1,
    seed: int = 0,
    callback: Callback | None = None,
) -> Dream:
    """Change the pixels of `start` (H, W, C) `steps` times by the gradient of log P(target | x).

    The bare gradient finds fine patterns that mean something to the network and nothing to us. So it is averaged over noisy
    copies α·(x + σ·ε) of the picture, which drown such patterns, and blurred; both less and less. It is then divided by its
    root mean square, so `rate` is how far a typical pixel moves in a step of the first half; in the second half the rate falls
    to nothing, and the picture settles. `callback(step, probability)` sees each step.
    Raises ValueError for a class that the judge doesn't know.
    """
    if not 0 <= target < judge.classes:
        raise ValueError(f"class {target}: the classifier knows classes 0 to {judge.classes - 1}")
    rng, device = np.random.default_rng([seed, 1]), judge.model.device
    x = np.array(start, np.float32)[None]
    velocity = np.zeros_like(x)
    pictures, probabilities = [], []
    for step in range(steps + 1):
        pictures.append(to_uint8(x[0]))
        with no_grad():
            probabilities.append(float(np.exp(log_probability(judge, tensor(x, device=device), target).item())))
        if callback is not None:
            callback(step, probabilities[-1])
        if step == steps:
            break
        done = step / steps
        sigma, std = (first + (last - first) * done for first, last in (NOISE, BLUR))
        noise = rng.standard_normal((COPIES, *x.shape[1:]), np.float32)
        leaf = tensor((x + sigma * noise) / math.sqrt(1 + sigma**2), requires_grad=True, device=device)
        slope = grad(log_probability(judge, leaf, target).sum(), leaf).numpy().mean(0)
        slope = np.einsum("ih,hwc,jw->ijc", _blur(slope.shape[0], std), slope, _blur(slope.shape[1], std))
        size = float(np.sqrt(np.mean(slope**2)))
        if not np.isfinite(size):
            raise ValueError(f"the gradient by the pixels is not finite at step {step}; is the classifier sound?")
        velocity = 0.9 * velocity + 0.1 * slope / max(size, 1e-12)
        x = np.clip(x + rate * min(1.0, 2 - 2 * done) * velocity, -1, 1)
    return Dream(np.stack(pictures), probabilities)


@dataclass(frozen=True)
class PixelGradients:
    """∂ log P(target | x)/∂x, computed two ways in float64.

    Attributes:
        differences, backward: (H, W, C). evaluations: forward passes, by picture, that the differences took.
        worst: largest |difference − backward|, over the largest |backward|.
    """

    differences: np.ndarray
    backward: np.ndarray
    seconds_differences: float
    seconds_backward: float
    evaluations: int

    @property
    def worst(self) -> float:
        return float(np.abs(self.differences - self.backward).max() / np.abs(self.backward).max())


def in_float64(judge: Judge) -> Judge:
    """The same classifier, computing in float64."""
    with no_init():  # and no random numbers drawn
        model = Classifier.from_config(judge.card["model"])
    for parameter, source in zip(model.parameters(), judge.model.parameters()):
        parameter.data = source.data.astype(np.float64)
        parameter.requires_grad = False
    return Judge(model.eval(), judge.card)


def pixel_gradients(judge: Judge, picture: np.ndarray, target: int, eps: float = 1e-5) -> PixelGradients:
    """Compare both ways at `picture` (H, W, C): central differences of each pixel, 98 perturbed pictures a forward pass
    (one at a time would be slower still), and one backward pass.
    """
    judge = in_float64(judge)
    device = judge.model.device
    x = np.asarray(picture, np.float64)
    log_probability(judge, tensor(x[None], device=device), target)  # the first call may compile or load kernels

    started = perf_counter()
    values = []
    for first in range(0, x.size, AT_ONCE):
        pixels = np.arange(first, min(first + AT_ONCE, x.size))
        changed = np.repeat(x.reshape(1, -1), 2 * len(pixels), 0)
        changed[np.arange(len(pixels)), pixels] += eps
        changed[len(pixels) + np.arange(len(pixels)), pixels] -= eps
        with no_grad():
            scores = log_probability(judge, tensor(changed.reshape(-1, *x.shape), device=device), target).numpy()
        values.append((scores[: len(pixels)] - scores[len(pixels) :]) / (2 * eps))
    seconds_differences = perf_counter() - started

    started = perf_counter()
    leaf = tensor(x[None], requires_grad=True, device=device)
    backward = grad(log_probability(judge, leaf, target).sum(), leaf).numpy()[0]
    seconds_backward = perf_counter() - started
    return PixelGradients(np.concatenate(values).reshape(x.shape), backward, seconds_differences, seconds_backward, 2 * x.size)
