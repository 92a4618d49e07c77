"""Light augmentation: pictures moved, turned and stretched a little, all of a batch at once."""

from __future__ import annotations

import numpy as np


def jitter(
    x: np.ndarray,
    rng: np.random.Generator,
    degrees: float = 10.0,
    scale: float = 0.1,
    shift: float = 2.0,
    background: float = -1.0,
) -> np.ndarray:
    """Each picture of x (N, H, W, C) under a random affine map: angles of ±`degrees`, sizes of 1 ± `scale`, ±`shift` pixels.

    Bilinear interpolation; what comes in from outside is `background`.
    """
    n, height, width, channels = x.shape
    angle = np.radians(rng.uniform(-degrees, degrees, n))
    stretch = 1 + rng.uniform(-scale, scale, (n, 2))
    move = rng.uniform(-shift, shift, (n, 2))
    rows, columns = np.meshgrid(np.arange(height) - (height - 1) / 2, np.arange(width) - (width - 1) / 2, indexing="ij")
    cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    source_row = (cos * rows - sin * columns) * stretch[:, 0, None, None] + move[:, 0, None, None] + (height - 1) / 2
    source_column = (sin * rows + cos * columns) * stretch[:, 1, None, None] + move[:, 1, None, None] + (width - 1) / 2
    # A border of background on every side stands for all that is outside.
    source_row, source_column = np.clip(source_row, -1, height) + 1, np.clip(source_column, -1, width) + 1
    framed = np.full((n, height + 3, width + 3, channels), background, x.dtype)
    framed[:, 1 : height + 1, 1 : width + 1] = x
    row, column = source_row.astype(np.intp), source_column.astype(np.intp)
    down, right = (source_row - row)[..., None].astype(x.dtype), (source_column - column)[..., None].astype(x.dtype)
    which = np.arange(n)[:, None, None]
    top = framed[which, row, column] * (1 - right) + framed[which, row, column + 1] * right
    bottom = framed[which, row + 1, column] * (1 - right) + framed[which, row + 1, column + 1] * right
    return top * (1 - down) + bottom * down
