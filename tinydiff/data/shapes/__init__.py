"""Coloured shapes with captions: drawn from words, and read back into words."""

from tinydiff.data.shapes.drawing import draw, example, load_shapes
from tinydiff.data.shapes.reading import agreement, read
from tinydiff.data.shapes.scenes import (
    COLOURS,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    candidates,
    draw_scene,
    misleading,
    parse,
    swaps,
)
