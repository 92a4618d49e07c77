"""Scenes as pictures: anti-aliased shapes on white, and as many of them as one likes, each from its number."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw

from tinydiff.data.captions import Captions
from tinydiff.data.dataset import Dataset
from tinydiff.data.shapes.scenes import COLOURS, Scene, Thing, draw_scene

BACKGROUND = (255, 255, 255)
RADII = {"small": (0.1, 0.115), "large": (0.155, 0.17)}  # least and most, by the picture's width
EXTENT = {"circle": 1.0, "square": 0.95, "triangle": 1.2, "star": 1.25}  # how far a shape of radius 1 reaches
MARGIN = 0.04
OVERSAMPLING = 4  # along each axis
COUNT = 20_000
SIZE_STEP = 32
LARGEST = 256


def outline(shape: str) -> list[tuple[float, float]]:
    """The corners (x, y), y downwards, of a shape of radius 1 around (0, 0). A circle has none."""
    reach = EXTENT[shape]
    if shape == "square":
        return [(-reach, -reach), (reach, -reach), (reach, reach), (-reach, reach)]
    if shape == "triangle":
        return [(0.0, -reach), (reach, reach * 0.9), (-reach, reach * 0.9)]
    corners = []
    for k in range(10):
        radius = reach if k % 2 == 0 else 0.45 * reach
        corners.append((radius * math.sin(math.pi * k / 5), -radius * math.cos(math.pi * k / 5)))
    return corners


def draw_mask(pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, fill: tuple[int, ...] | int) -> None:
    """Fill a shape around (x, y); all in pixels of the oversampled picture."""
    if shape == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    else:
        pen.polygon([(x + radius * u, y + radius * v) for u, v in outline(shape)], fill=fill)


def draw(scene: Scene, size: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 (size, size, 3): the scene, where nothing is said by chance (places, sizes within their range, unsaid sizes)."""
    radii, places = _lay_out(scene, rng)
    width = size * OVERSAMPLING
    picture = Image.new("RGB", (width, width), BACKGROUND)
    pen = ImageDraw.Draw(picture)
    for thing, radius, (x, y) in zip(scene.things, radii, places):
        draw_mask(pen, thing.shape, x * width, y * width, radius * width, COLOURS[thing.colour])
    return np.asarray(picture.reduce(OVERSAMPLING))


def _lay_out(scene: Scene, rng: np.random.Generator) -> tuple[list[float], list[tuple[float, float]]]:
    """Radii and centres, by the picture's width: nothing touches, and two things lie well within 45° of their axis."""
    radii = [_radius(thing, rng) for thing in scene.things]
    reach = [radius * EXTENT[thing.shape] for thing, radius in zip(scene.things, radii)]
    if scene.second is None:
        x, y = (reach[0] + MARGIN + rng.random() * (1 - 2 * reach[0] - 2 * MARGIN) for _ in range(2))
        return radii, [(x, y)]
    spare = 1 - 2 * sum(reach) - 3 * MARGIN
    before, between = np.sort(rng.random(2)) * spare
    along = (MARGIN + before + reach[0], 1 - MARGIN - (spare - between) - reach[1])
    across = [reach[0] + MARGIN + rng.random() * (1 - 2 * reach[0] - 2 * MARGIN), 0.0]
    slant = 0.5 * (along[1] - along[0])
    least, most = max(reach[1] + MARGIN, across[0] - slant), min(1 - reach[1] - MARGIN, across[0] + slant)
    across[1] = least + rng.random() * (most - least)
    places = list(zip(along, across)) if scene.relation == "left of" else list(zip(across, along))
    return radii, places


def _radius(thing: Thing, rng: np.random.Generator) -> float:
    least, most = RADII[thing.size or ("small" if rng.random() < 0.5 else "large")]
    return least + rng.random() * (most - least)


def example(seed: int, index: int, size: int = 32, split: str = "train") -> tuple[Scene, np.ndarray]:
    """Example `index` of the endless row that `seed` and `split` begin: a scene, and its picture uint8 (size, size, 3)."""
    rng = np.random.default_rng([seed, index, split == "test"])
    scene = draw_scene(rng, split)
    return scene, draw(scene, size, rng)


def load_shapes(name: str, split: str, size: int, count: int | None = None, seed: int = 0) -> Dataset:
    """The first `count` (by default 20,000) training examples with their captions, or a tenth as many test examples."""
    if size % SIZE_STEP or not SIZE_STEP <= size <= LARGEST:
        raise ValueError(f"size={size}: {name} are drawn 32, 64, 96 … or {LARGEST} pixels high and wide; choose one of these")
    count = COUNT if count is None else count
    count = count if split == "train" else max(1, count // 10)
    pictures = np.empty((count, size, size, 3), np.uint8)
    captions = []
    for index in range(count):
        scene, pictures[index] = example(seed, index, size, split)
        captions.append(scene.captions())
    return Dataset(pictures, None, name, captions=Captions.of(captions))
