"""What a network predicts, and how one prediction becomes another.

Three kinds: "noise" (ε, Ho et al. 2020), "x0" (the clean picture) and "v" = α·ε − σ·x_0 (Salimans & Ho 2022). With
x_t = α·x_0 + σ·ε each determines the others. Arrays are (N, …); alpha and sigma are numbers or one value a sample, (N,).
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tinydiff.names import choose

Array = NDArray[Any]
KINDS = {"noise": "the noise", "x0": "the clean picture", "v": "alpha * noise - sigma * x0"}


def per_sample(value: ArrayLike, like: Array) -> Array:
    """A number, or values (N,), shaped to multiply `like` (N, …) and in its dtype."""
    value = np.asarray(value, dtype=like.dtype)
    if value.ndim == 0:
        return value
    if value.shape != like.shape[:1]:
        raise ValueError(f"one value a sample is needed: got shape {value.shape} for an array of shape {like.shape}")
    return value.reshape(-1, *[1] * (like.ndim - 1))


def add_noise(x0: Array, noise: Array, alpha: ArrayLike, sigma: ArrayLike) -> Array:
    """x_t = α·x_0 + σ·ε."""
    return per_sample(alpha, x0) * x0 + per_sample(sigma, x0) * noise


def target(kind: str, x0: Array, noise: Array, alpha: ArrayLike, sigma: ArrayLike) -> Array:
    """What a network of this kind should answer for the picture `x0` with this noise. Raises ValueError for an unknown kind."""
    choose(KINDS, kind, "prediction kind")
    if kind == "noise":
        return noise
    if kind == "x0":
        return x0
    return per_sample(alpha, x0) * noise - per_sample(sigma, x0) * x0


def to_x0(prediction: Array, x: Array, alpha: ArrayLike, sigma: ArrayLike, kind: str) -> Array:
    """The clean picture that a prediction at x implies. Raises ValueError where it implies none (noise at α = 0)."""
    choose(KINDS, kind, "prediction kind")
    if kind == "x0":
        return prediction
    a, s = per_sample(alpha, x), per_sample(sigma, x)
    if kind == "v":
        return a * x - s * prediction
    if not np.all(a):
        raise ValueError("a noise prediction says nothing of the picture at alpha = 0; predict v or x0 there")
    return (x - s * prediction) / a


def to_noise(prediction: Array, x: Array, alpha: ArrayLike, sigma: ArrayLike, kind: str) -> Array:
    """The noise that a prediction at x implies. Raises ValueError where it implies none (x0 at σ = 0)."""
    choose(KINDS, kind, "prediction kind")
    if kind == "noise":
        return prediction
    a, s = per_sample(alpha, x), per_sample(sigma, x)
    if kind == "v":
        return s * x + a * prediction
    if not np.all(s):
        raise ValueError("a picture says nothing of the noise at sigma = 0; the clean time t = -1 has no noise to predict")
    return (x - a * prediction) / s
