"""Make the shipped page of pictures with captions, from OpenMoji's drawings: python scripts/make_page.py

Needs the extra `pictures`. Each drawing lies on white in 96 × 96 pixels of at most 48 colours. The same packages give the same
files.
"""

from __future__ import annotations

import argparse
import html
import io
from pathlib import Path

import numpy as np
from PIL import Image

from tinydiff.data import SHIPPED
from tinydiff.data.pictures import find_drawings, render

SIZE = 96
COLOURS = 48

# caption: the drawings it shows, the first lowest
PAGE = {
    "a hungry dinosaur": "T-Rex",
    "a soaring bird": "eagle",
    "a burning sword": "fire + dagger",
    "a long-necked dinosaur": "sauropod",
    "a brave astronaut": "astronaut",
    "a galloping horse": "horse",
    "a friendly robot": "robot",
    "a rocket on its way to the moon": "rocket",
    "a prowling cat": "cat",
    "a loyal dog": "dog face",
    "a sly fox": "fox",
    "a wise owl": "owl",
    "a colourful parrot": "parrot",
    "a penguin spreading its wings": "penguin",
    "a huge elephant": "elephant",
    "a leaping dolphin": "dolphin",
    "a whale blowing water": "spouting whale",
    "an octopus with curling arms": "octopus",
    "a crab with open claws": "crab",
    "a slow turtle": "turtle",
    "a patient snail": "snail",
    "a hissing snake": "snake",
    "a busy honeybee": "honeybee",
    "a fluttering butterfly": "butterfly",
    "a spider with eight legs": "spider",
    "a prickly hedgehog": "hedgehog",
    "a prickly cactus": "cactus",
    "a bright sunflower": "sunflower",
    "a red rose with a green leaf": "rose",
    "a tall green fir tree": "evergreen tree",
    "a tall palm tree": "palm tree",
    "a red mushroom with white dots": "mushroom",
    "an erupting volcano": "volcano",
    "a mountain covered in snow": "snow-capped mountain",
    "a rainbow after the rain": "rainbow",
    "a cloud with lightning": "cloud with lightning",
    "a whirling tornado": "tornado",
    "a smiling snowman": "snowman without snow",
    "a crackling fire": "fire",
    "a glowing star": "star",
    "a thin crescent moon": "crescent moon",
    "a planet with a ring": "ringed planet",
    "a juicy red apple": "red apple",
    "a bunch of purple grapes": "grapes",
    "a ripe yellow banana": "banana",
    "a sweet strawberry": "strawberry",
    "a slice of watermelon": "watermelon",
    "a birthday cake with a cherry": "birthday cake",
    "a slice of hot pizza": "pizza",
    "a tasty hamburger": "hamburger",
    "an old castle with three towers": "castle",
    "a little house with a garden": "house with garden",
    "a boat with two sails": "sailboat",
    "a speeding racing car": "racing car",
    "a red bicycle": "bicycle",
    "a red balloon on a string": "balloon",
    "a golden crown": "crown",
    "a ticking alarm clock": "alarm clock",
    "an electric guitar": "guitar",
    "an open umbrella": "umbrella",
}

HEAD = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>Sixty pictures with captions</title>
<style>body { font: 16px sans-serif } figure { display: inline-block; width: 150px; margin: 8px; vertical-align: top }</style>
<h1>Sixty pictures with captions</h1>
<p>The drawings are OpenMoji's (<a href="https://openmoji.org">openmoji.org</a>), under the licence
<a href="https://creativecommons.org/licenses/by-sa/4.0/">CC BY-SA 4.0</a>; see LICENSE.md for what was changed.</p>
"""


def draw(names: list[str], files: dict[str, Path]) -> bytes:
    """A PNG of the drawings, one over the other."""
    pictures = render({name: files[name] for name in names}, SIZE).astype(int)
    picture = pictures[0]
    for upper in pictures[1:]:  # dark lines and colours of the upper one cover, its white does not
        picture = np.where((upper < 250).any(2, keepdims=True), upper, picture)
    buffer = io.BytesIO()
    few = Image.fromarray(picture.astype(np.uint8)).quantize(COLOURS, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    few.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=SHIPPED / "page")
    folder = parser.parse_args().out
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    files = find_drawings()
    lines = [HEAD]
    for caption, drawings in PAGE.items():
        names = drawings.split(" + ")
        file = "pictures/" + "-and-".join(names).replace(" ", "-").lower() + ".png"
        (folder / file).write_bytes(draw(names, files))
        said = html.escape(caption)
        lines.append(f'<figure><img src="{file}" alt="{said}"><figcaption>{said}</figcaption></figure>\n')
    (folder / "index.html").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
