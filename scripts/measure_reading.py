"""How often scenes of shapes are read back rightly from clean and from damaged pictures: python scripts/measure_reading.py [N]"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter

from tinydiff.data import shapes


def blurred(picture: np.ndarray, deviation: float) -> np.ndarray:
    """Under a Gaussian blur of so many pixels."""
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(deviation)))


def noised(picture: np.ndarray, deviation: float, rng: np.random.Generator) -> np.ndarray:
    """Under Gaussian noise of so many steps of 255."""
    return np.clip(picture + rng.normal(0, deviation, picture.shape), 0, 255).astype(np.uint8)


def main() -> None:
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    rng = np.random.default_rng(0)
    damages: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "clean": lambda picture: picture,
        "tinted": lambda picture: (picture * (0.9, 0.94, 0.92)).astype(np.uint8),
        "blur 0.7": lambda picture: blurred(picture, 0.7),
        "blur 1": lambda picture: blurred(picture, 1.0),
        "noise 15": lambda picture: noised(picture, 15, rng),
        "noise 30": lambda picture: noised(picture, 30, rng),
        "blur 0.7, noise 20": lambda picture: noised(blurred(picture, 0.7), 20, rng),
    }
    examples = [shapes.example(0, i, split="train" if i % 2 else "test") for i in range(n)]
    for name, damage in damages.items():
        right: Counter[str] = Counter()
        for scene, picture in examples:
            found = shapes.agreement(shapes.read(damage(picture)), scene)
            right.update([*(part for part, good in found.items() if good), *(["all"] if all(found.values()) else [])])
        print(f"{name:20}", ", ".join(f"{part} {right[part] / n:.3f}" for part in ("colour", "shape", "size", "relation", "all")))


if __name__ == "__main__":
    main()
