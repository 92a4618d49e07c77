"""Where diffusion happens: among the pixels of pictures, or among an autoencoder's latents. Whoever draws or trains asks a space
and doesn't know which it is.

Latent diffusion (Rombach et al. 2022) is diffusion in the second: what is drawn there is decoded, what is changed there encoded.
"""

from __future__ import annotations

import hashlib
import sys
from typing import Protocol

import numpy as np

from tinydiff.autograd import no_grad
from tinydiff.cache import cached
from tinydiff.images import from_uint8, to_uint8
from tinydiff.models import AutoencoderKL
from tinydiff.tensor import as_tensor

BATCH = 64


class Space(Protocol):
    """What stands for pictures of one shape, as float32 (N, *size).

    Attributes:
        shape: (H, W, C) of the pictures; size: (h, w, c) of what stands for one.
        clip: how far from 0 its numbers get, None for no bound.
    """

    shape: tuple[int, int, int]
    size: tuple[int, int, int]
    clip: float | None

    def encode(self, pictures: np.ndarray) -> np.ndarray:
        """What stands for uint8 pictures (N, H, W, C)."""
        ...

    def decode(self, x: np.ndarray) -> np.ndarray:
        """The pictures, uint8 (N, H, W, C), that x stands for."""
        ...

    def cover(self, mask: np.ndarray) -> np.ndarray:
        """Where (h, w, 1) a change reaches that is allowed where `mask` (H, W) is True."""
        ...


class Pixels:
    """Pictures in [-1, 1], with a border of -1 around them."""

    clip: float | None = 1.0

    def __init__(self, shape: tuple[int, int, int], border: int = 0) -> None:
        self.shape, self.border = shape, border
        self.size = (shape[0] + 2 * border, shape[1] + 2 * border, shape[2])

    def encode(self, pictures: np.ndarray) -> np.ndarray:
        """See `Space`."""
        edges = ((0, 0), (self.border,) * 2, (self.border,) * 2, (0, 0))
        x = from_uint8(pictures)
        return np.pad(x, edges, constant_values=-1.0) if self.border else x

    def decode(self, x: np.ndarray) -> np.ndarray:
        """See `Space`."""
        b = self.border
        return to_uint8(x[:, b : x.shape[1] - b, b : x.shape[2] - b] if b else x)

    def cover(self, mask: np.ndarray) -> np.ndarray:
        """See `Space`."""
        return np.pad(mask, self.border)[..., None]


class Latents:
    """The latents of an autoencoder, shifted and scaled to deviation 1. `model` takes pictures of `shape`."""

    clip: float | None = None

    def __init__(self, shape: tuple[int, int, int], model: AutoencoderKL) -> None:
        if model.config["in_channels"] != shape[2] or model.config["out_channels"] != shape[2]:
            raise ValueError(
                f"the autoencoder turns {model.config['in_channels']} channels into {model.config['out_channels']}, "
                f"and the pictures have {shape[2]}; train one on them"
            )
        self.shape, self.model = shape, model
        self.size = (-(-shape[0] // model.factor), -(-shape[1] // model.factor), model.config["latent_channels"])

    def moments(self, pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and deviation, each (N, *size), of the Gaussian that stands for each picture."""
        means, deviations = [], []
        for start in range(0, len(pictures), BATCH):
            with no_grad():
                found = self.model.encode(as_tensor(from_uint8(pictures[start : start + BATCH])).to(self.model.device))
            means.append(self.model.scale(found.mean.numpy()))
            deviations.append(np.exp(found.logvar.numpy() / 2) * np.float32(self.model.config["scaling_factor"]))
        return np.concatenate(means).astype(np.float32), np.concatenate(deviations).astype(np.float32)

    def encode(self, pictures: np.ndarray) -> np.ndarray:
        """See `Space`; the likeliest latents."""
        return self.moments(pictures)[0]

    def decode(self, x: np.ndarray) -> np.ndarray:
        """See `Space`."""
        parts = [np.zeros((0, *self.shape), np.uint8)]
        for start in range(0, len(x), BATCH):
            with no_grad():
                z = as_tensor(self.model.unscale(x[start : start + BATCH]).astype(np.float32)).to(self.model.device)
                parts.append(to_uint8(self.model.decode(z, self.shape[:2]).numpy()))
        return np.concatenate(parts)

    def cover(self, mask: np.ndarray) -> np.ndarray:
        """See `Space`: each latent of which some pixel may change."""
        height, width, _ = self.size
        factor = self.model.factor
        whole = np.zeros((height * factor, width * factor), bool)
        whole[: mask.shape[0], : mask.shape[1]] = mask
        blocks = whole.reshape(height, factor, width, factor, 1)
        return blocks.max(axis=(1, 3))


def cached_moments(space: Latents, pictures: np.ndarray, weights: str) -> tuple[np.ndarray, np.ndarray]:
    """`space.moments(pictures)`, computed once for these pictures and these `weights` (their hash) and kept in the cache."""
    digest = hashlib.sha256(pictures.tobytes()).hexdigest()
    key = {"weights": weights, "pictures": digest, "shape": list(pictures.shape)}

    def encode() -> dict[str, np.ndarray]:
        print(f"tinydiff: encoding {len(pictures):,} pictures (once) …", file=sys.stderr)
        return dict(zip(("mean", "std"), space.moments(pictures)))

    found = cached("latents", key, encode)
    return found["mean"], found["std"]
