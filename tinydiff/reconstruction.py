"""What an autoencoder gives back, how its latents are spread, and how it compares with PCA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tinydiff import data, metrics
from tinydiff.autograd import no_grad
from tinydiff.images import from_uint8, grid
from tinydiff.models import AutoencoderKL
from tinydiff.pipeline import load_model, weights_hash
from tinydiff.tensor import as_tensor

BATCH = 64
DEAD = 0.01  # a channel that varies less than this part of all of them carries nothing


def reconstruct(model: AutoencoderKL, pictures: np.ndarray) -> np.ndarray:
    """uint8 pictures (N, H, W, C) through the plain bottleneck and back: float32 in [0, 1]."""
    parts = []
    for start in range(0, len(pictures), BATCH):
        with no_grad():
            back = model(as_tensor(from_uint8(pictures[start : start + BATCH])).to(model.device)).numpy()
        parts.append(np.clip(back / 2 + 0.5, 0, 1))
    return np.concatenate(parts)


def side_by_side(pictures: np.ndarray, back: np.ndarray, columns: int = 8) -> np.ndarray:
    """One picture (uint8) of pairs of rows: originals (uint8) above what came back (floats in [0, 1])."""
    shown = min(len(pictures), max(columns, len(pictures) // columns * columns))
    columns = min(columns, shown)
    rows = [np.concatenate([pictures[i : i + columns], _bytes(back[i : i + columns])]) for i in range(0, shown, columns)]
    return grid(np.concatenate(rows), columns, enlarged=max(1, 64 // max(pictures.shape[1:3])))


def _bytes(unit: np.ndarray) -> np.ndarray:
    return np.rint(unit * 255).astype(np.uint8)


def fidelity(pictures: np.ndarray, back: np.ndarray) -> dict[str, float]:
    """Means over the pictures of psnr (dB), ssim and mse (pixels in [0, 1])."""
    return {name: float(getattr(metrics, name)(pictures, back).mean()) for name in ("psnr", "ssim", "mse")}


def measure_latents(model: AutoencoderKL, pictures: np.ndarray, sampled: bool) -> dict[str, Any]:
    """Mean and deviation of the latents of uint8 pictures: by channel, `mean` and `std`, and over all, as `shift_factor` and
    `scaling_factor` (1/deviation); and the channels that are `dead`. With `sampled`, of samples of the Gaussian, else its mean.
    """
    means, variances = [], []
    for start in range(0, len(pictures), BATCH):
        with no_grad():
            latents = model.encode(as_tensor(from_uint8(pictures[start : start + BATCH])).to(model.device))
        means.append(latents.mean.numpy())
        variances.append(np.exp(latents.logvar.numpy()))
    z = np.concatenate(means).astype(np.float64)
    noise = np.concatenate(variances).astype(np.float64) if sampled else np.zeros_like(z)
    carried, whole = z.std((0, 1, 2)), float(np.sqrt(z.var() + noise.mean()))
    return {
        "mean": z.mean((0, 1, 2)).tolist(),
        "std": np.sqrt(z.var((0, 1, 2)) + noise.mean((0, 1, 2))).tolist(),
        "dead": [i for i, std in enumerate(carried) if std <= DEAD * carried.max()],
        "shift_factor": float(z.mean()),
        "scaling_factor": 1 / whole if whole > 0 else 1.0,
    }


def evaluate_autoencoder(run: str | Path, n: int | None = None, spec: str | None = None, device: str = "cpu") -> dict[str, Any]:
    """PSNR, SSIM and MSE of the first n test pictures (all, if not given), and PCA's MSE with as many numbers a picture.

    PCA is None where the training pictures have fewer components than the latents have numbers.
    """
    model, card = load_model(run, "autoencoder", device)
    assert isinstance(model, AutoencoderKL)
    spec, size = spec or card["data"], card.get("size")
    train, test = data.load(spec, size=size), data.load(spec, "test", size)
    if test.images.shape[3] != card["shape"][2]:
        raise ValueError(f"the autoencoder takes {card['shape'][2]} channels; the pictures of {spec} have {test.images.shape[3]}")
    pictures = test.images[:n]
    height, width = (-(-side // model.factor) for side in pictures.shape[1:3])
    numbers = height * width * model.config["latent_channels"]
    linear = None
    if numbers <= min(len(train), np.prod(pictures.shape[1:])):
        linear = float(metrics.mse(pictures, metrics.pca_reconstruct(train.images, pictures, numbers)).mean())
    return {
        "task": "autoencoder",
        "n": len(pictures),
        "numbers": numbers,
        "ratio": float(np.prod(pictures.shape[1:]) / numbers),
        **fidelity(pictures, reconstruct(model, pictures)),
        "mse_pca": linear,
        "scaling_factor": model.config["scaling_factor"],
        "data": spec,
        "weights": weights_hash(model),
    }
