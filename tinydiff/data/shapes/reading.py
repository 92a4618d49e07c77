"""Pictures of shapes back into words: what a drawn or generated picture shows, and whether that is what was asked for.

A picture is explained as white with a few shapes on it. The shape that explains most of it is found by correlation, first roughly
with discs, then near that place with every shape in every colour, at several sizes, sharp and blurred; it is taken away, and the
search goes on in what is left (matching pursuit: Mallat & Zhang 1993). A picture is read as None when it shows no shape, or more
than two, or anything that shapes on white don't explain.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from tinydiff.data.shapes.drawing import BACKGROUND, OVERSAMPLING, draw_mask
from tinydiff.data.shapes.scenes import COLOURS, SHAPES, Scene, Thing

GRID = 32  # pictures are read at this size; larger ones are averaged down to it
WINDOW = 23  # the templates' own
RADII = tuple(np.arange(0.085, 0.2, 0.0125))  # by the picture's width
LARGE_FROM = 0.136
BLURS = (0.0, 1.0)  # standard deviations, in pixels of the grid
STEPS = tuple(np.arange(-1.5, 1.6, 0.5))  # places tried around the rough one
CONTRAST = (0.5, 1.3)  # least and most of a colour's difference from white
LEAST_AREA = 8.0  # pixels of full contrast: less is what blur and noise leave over
MOST_UNEXPLAINED = 0.25  # of the picture's energy, smoothed so that noise counts little
WELL_EXPLAINED = 0.03
TINT = 40  # how far from white the background may be

_names = tuple(COLOURS)
_directions = np.array([np.subtract(COLOURS[name], BACKGROUND) for name in _names], np.float32)
_lengths = (_directions**2).sum(1)


@dataclass(frozen=True)
class _Found:
    thing: Thing
    radius: float
    row: float  # the centre, in pixels of the grid
    column: float


def _size(radius: float) -> str:
    return "large" if radius >= LARGE_FROM else "small"


@lru_cache(maxsize=1)
def _templates() -> tuple[list[tuple[str, float, float, float]], np.ndarray, np.ndarray]:
    """(shape, radius, place down, place right) of each, masks (K, WINDOW²) around the middle, and their sums of squares."""
    kinds = [(shape, radius, down, right) for shape in SHAPES for radius in RADII for down in STEPS for right in STEPS]
    names, masks = [], []
    for shape, radius, down, right in kinds:
        fine = Image.new("L", (WINDOW * OVERSAMPLING,) * 2, 0)
        x, y = ((WINDOW / 2 + offset) * OVERSAMPLING for offset in (right, down))
        draw_mask(ImageDraw.Draw(fine), shape, x, y, radius * GRID * OVERSAMPLING, 255)
        for blur in BLURS:
            mask = fine.filter(ImageFilter.GaussianBlur(blur * OVERSAMPLING)).reduce(OVERSAMPLING)
            names.append((shape, radius, down, right))
            masks.append(np.asarray(mask, np.float32).reshape(-1) / 255)
    stacked = np.stack(masks)
    return names, stacked, (stacked**2).sum(1)


@lru_cache(maxsize=1)
def _discs() -> np.ndarray:
    """Transforms (R, …) of discs of three radii, conjugate, each brought to length 1, around pixel (0, 0)."""
    reach = np.minimum(np.arange(2 * GRID), 2 * GRID - np.arange(2 * GRID))
    distance = np.hypot(reach[:, None], reach)
    discs = np.stack([np.clip(radius * GRID + 0.5 - distance, 0, 1) for radius in (0.1, 0.135, 0.165)])
    return np.conj(np.fft.rfft2(discs / np.sqrt((discs**2).sum((1, 2), keepdims=True))))


def read(picture: np.ndarray) -> Scene | None:
    """The scene in a picture, uint8 (H, W, 3) with H = W a multiple of 32; None if it can't be read with confidence."""
    found = find(picture)
    if not found or len(found) > 2:
        return None
    if len(found) == 1:
        return Scene(found[0].thing)
    x, y = found
    down, right = y.row - x.row, y.column - x.column
    relation, order = ("above", down) if abs(down) > abs(right) else ("left of", right)
    return Scene(x.thing, relation, y.thing) if order > 0 else Scene(y.thing, relation, x.thing)


def find(picture: np.ndarray) -> list[_Found]:
    """The shapes in a picture, the strongest first; none if they don't explain the picture."""
    height, width = picture.shape[:2]
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or height != width or height % GRID:
        raise ValueError(
            f"a picture of shapes is uint8 (H, H, 3) with H a multiple of {GRID}, got {picture.dtype} {picture.shape}"
        )
    factor = height // GRID
    pixels = picture.reshape(GRID, factor, GRID, factor, 3).mean((1, 3), dtype=np.float32)
    background = np.median(pixels, axis=(0, 1))  # of which there is more than of shapes; a generated picture's is not quite white
    if np.abs(background - BACKGROUND).max() > TINT:
        return []
    rest = pixels - background
    noise = _noise_energy(rest)
    total = _smooth_energy(rest)
    best: list[_Found] = []
    least = MOST_UNEXPLAINED * total + noise
    for first in (None, "small"):  # two small shapes side by side may look like a large one: then begin with a small one
        found, left = _pursue(rest, first)
        if left <= least:
            best, least = found, left
        if left - noise <= WELL_EXPLAINED * total:
            break
    return best


def _pursue(rest: np.ndarray, size: str | None) -> tuple[list[_Found], float]:
    """At most three shapes, the first of them of the given size, and what they leave unexplained."""
    found: list[_Found] = []
    while len(found) < 3 and (strongest := _strongest(rest, None if found else size)) is not None:
        found.append(strongest[0])
        rest = rest - strongest[1]
    return found, _smooth_energy(rest)


def _smooth_energy(x: np.ndarray) -> float:
    """The sum of squares of averages over 3 × 3 pixels."""
    framed = np.pad(x, ((1, 1), (1, 1), (0, 0)))
    sums = np.lib.stride_tricks.sliding_window_view(framed, (3, 3), (0, 1)).mean((3, 4))
    return float((sums**2).sum())


def _noise_energy(x: np.ndarray) -> float:
    """What `_smooth_energy` expects of independent noise as strong as neighbouring pixels differ by, away from edges."""
    variance = np.median(np.diff(x, axis=1) ** 2) / (2 * 0.455)  # the median of a squared standard normal variable is 0.455
    return float(x.size * variance / 9)


def _strongest(rest: np.ndarray, size: str | None) -> tuple[_Found, np.ndarray] | None:
    """The shape that explains most of `rest` (GRID, GRID, 3), and what it explains; None if nothing looks like a shape.

    `size` "small" or "large" leaves out the others.
    """
    maps = np.einsum("hwc,kc->khw", rest, _directions) / _lengths[:, None, None]  # by colour; 1 is full contrast
    spectra = np.fft.rfft2(maps, (2 * GRID, 2 * GRID))
    rough = np.fft.irfft2(spectra[:, None] * _discs(), (2 * GRID, 2 * GRID))[..., :GRID, :GRID]
    energy = (np.maximum(rough, 0) ** 2 * _lengths[:, None, None, None]).max(0)  # by radius, row, column
    places = [np.unravel_index(int(each.argmax()), each.shape) for each in energy]  # large discs may lie across two shapes
    half = WINDOW // 2
    framed = np.pad(maps, ((0, 0), (half, half), (half, half)))
    windows = [framed[:, row : row + WINDOW, column : column + WINDOW].reshape(len(maps), -1) for row, column in places]
    names, masks, squares = _templates()
    inner = np.stack(windows) @ masks.T  # by place, colour, template
    contrast = inner / squares
    area = np.where((contrast >= CONTRAST[0]) & (contrast <= CONTRAST[1]), inner * contrast, 0)
    if size is not None:
        area[..., [_size(radius) != size for _, radius, _, _ in names]] = 0
    best = np.unravel_index(int((area * _lengths[:, None]).argmax()), area.shape)
    if area[best] < LEAST_AREA:
        return None
    (row, column), colour, k = places[best[0]], best[1], best[2]
    shape, radius, down, right = names[k]
    explained = np.zeros_like(framed[0])
    explained[row : row + WINDOW, column : column + WINDOW] = contrast[best] * masks[k].reshape(WINDOW, WINDOW)
    thing = Thing(_names[colour], shape, _size(radius))
    place = _Found(thing, radius, row + down, column + right)
    return place, explained[half:-half, half:-half, None] * _directions[colour]


def agreement(shown: Scene | None, wanted: Scene) -> dict[str, bool]:
    """Whether what a picture shows agrees with what was asked for, by "colour", "shape", "size" and "relation".

    Of two things it is those taken for each other that agree in most; where nothing is said of a size any will do. With another
    number of things than was wanted, or nothing read at all, nothing agrees.
    """
    names = ("colour", "shape", "size", "relation")
    if shown is None or len(shown.things) != len(wanted.things):
        return dict.fromkeys(names, False)
    found = []
    for order in permutations(range(len(shown.things))):
        pairs = [(shown.things[place], thing) for place, thing in zip(order, wanted.things)]
        found.append(
            {
                "colour": all(a.colour == b.colour for a, b in pairs),
                "shape": all(a.shape == b.shape for a, b in pairs),
                "size": all(b.size in (None, a.size) for a, b in pairs),
                "relation": shown.relation == wanted.relation and order == tuple(sorted(order)),
            }
        )
    return max(found, key=lambda each: sum(each.values()))
