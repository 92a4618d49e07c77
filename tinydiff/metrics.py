"""How close pictures are to others: MSE, PSNR and SSIM; and what the best linear code of a size, PCA, would reach.

Pictures are (N, H, W, C) floats in [0, 1], or uint8; a value for each picture comes back, float64 (N,).
"""

from __future__ import annotations

import numpy as np

PCA_MOST = 4000  # sides of the matrix whose eigenvectors are sought, for larger pictures


def _unit(x: np.ndarray) -> np.ndarray:
    return x / 255.0 if x.dtype == np.uint8 else np.asarray(x, np.float64)


def _pair(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if x.shape != y.shape or x.ndim != 4 or 0 in x.shape:
        raise ValueError(f"pictures are compared with as many of the same shape (N, H, W, C), not {x.shape} with {y.shape}")
    return _unit(x), _unit(y)


def mse(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Mean squared error, of pixels in [0, 1]. Raises ValueError for other shapes than (N, H, W, C) twice."""
    x, y = _pair(x, y)
    return ((x - y) ** 2).mean((1, 2, 3))


def psnr(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB: -10 log₁₀ MSE; infinite for equal pictures."""
    with np.errstate(divide="ignore"):
        return -10 * np.log10(mse(x, y))


def ssim(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Structural similarity (Wang et al. 2004): 1 for equal pictures. The mean over channels and places.

    With a Gaussian window of 11×11 (σ = 1.5) that lies wholly within the picture, smaller in pictures that are; K = 0.01, 0.03.
    """
    x, y = _pair(x, y)
    radius = min(5, (min(x.shape[1:3]) - 1) // 2)
    window = np.exp(-0.5 * (np.arange(-radius, radius + 1) / 1.5) ** 2)
    window /= window.sum()

    def blur(values: np.ndarray) -> np.ndarray:
        for axis in (1, 2):
            size = values.shape[axis] - 2 * radius
            parts = (np.take(values, range(i, i + size), axis) * weight for i, weight in enumerate(window))
            values = sum(parts, np.zeros(()))
        return values

    mean_x, mean_y = blur(x), blur(y)
    variance_x, variance_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    similar = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (similar / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))).mean((1, 2, 3))


def pca_reconstruct(train: np.ndarray, test: np.ndarray, numbers: int) -> np.ndarray:
    """The test pictures, each from its first so many principal components of the training pictures, clipped to [0, 1].

    Pictures of more than `PCA_MOST` pixels are taken from the first `PCA_MOST` training pictures. Raises ValueError when there
    are fewer components.
    """
    shape, size = test.shape, int(np.prod(test.shape[1:]))
    flat = _unit(train[:PCA_MOST] if size > PCA_MOST else train).reshape(-1, size).astype(np.float32)
    if not 1 <= numbers <= min(flat.shape):
        raise ValueError(f"PCA of {len(flat)} pictures of {size} pixels has {min(flat.shape)} components, not {numbers}")
    mean = flat.mean(0, dtype=np.float64).astype(np.float32)
    flat -= mean
    if size <= len(flat):
        axes = np.linalg.eigh((flat.T @ flat).astype(np.float64))[1][:, -numbers:]
    else:  # the same axes from the smaller matrix of products between pictures
        axes = np.linalg.qr(flat.T @ np.linalg.eigh((flat @ flat.T).astype(np.float64))[1][:, -numbers:])[0]
    centred = _unit(test).reshape(-1, size) - mean
    return np.clip(centred @ axes @ axes.T + mean, 0, 1).reshape(shape)
