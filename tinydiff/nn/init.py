"""Initialisers: arrays to start parameters from, drawn from the package's generator (`tinydiff.manual_seed`)."""

from __future__ import annotations

import math

import numpy as np

from tinydiff import random
from tinydiff.nn.module import is_filling

Shape = tuple[int, ...]


def constant(shape: Shape, value: float) -> np.ndarray:
    """`value` everywhere, float32."""
    return np.full(shape, value, np.float32) if is_filling() else np.empty(shape, np.float32)


def zeros(shape: Shape) -> np.ndarray:
    """0 everywhere, float32."""
    return constant(shape, 0.0)


def ones(shape: Shape) -> np.ndarray:
    """1 everywhere, float32."""
    return constant(shape, 1.0)


def uniform(shape: Shape, bound: float) -> np.ndarray:
    """Uniform in ±`bound`, float32."""
    if not is_filling():
        return np.empty(shape, np.float32)
    values = random.generator().random(shape, np.float32)
    values *= 2 * bound
    values -= bound
    return values


def normal(shape: Shape, std: float = 1.0) -> np.ndarray:
    """Normal with mean 0 and standard deviation `std`, float32."""
    return (
        random.generator().standard_normal(shape, np.float32) * np.float32(std) if is_filling() else np.empty(shape, np.float32)
    )


def fan_in_uniform(shape: Shape) -> np.ndarray:
    """Uniform in ±1/√fan_in, where all axes but the last lead in: PyTorch's start for linear and convolution weights."""
    return uniform(shape, 1 / math.sqrt(math.prod(shape[:-1])))
