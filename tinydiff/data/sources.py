"""`load`: pictures by what one calls them, such as "digits" or "folder:DIR"."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from tinydiff.data.dataset import Dataset
from tinydiff.data.folders import DIGITS, FASHION, load_folder, load_idx
from tinydiff.data.pictures import load_pictures

SHIPPED = Path(__file__).parent / "shipped"


@dataclass(frozen=True)
class Request:
    """What was asked for: `spec` is all of it, `path` what stands after its colon, `size` the pictures' height and width."""

    spec: str
    path: Path
    split: str
    size: int


@dataclass(frozen=True)
class Source:
    """How pictures of one kind are loaded.

    Attributes:
        load: gives the Dataset.
        argument: what stands after the colon, such as "DIR"; empty if nothing does.
        size: how high and wide pictures are made where no size is given; 0 if they have a size of their own.
    """

    load: Callable[[Request], Dataset]
    argument: str = ""
    size: int = 0


SOURCES = {
    "digits": Source(lambda asked: load_idx(asked.spec, SHIPPED, asked.split, DIGITS, prefix="digits-")),
    "mnist": Source(lambda asked: load_idx(asked.spec, asked.path, asked.split, DIGITS), "DIR"),
    "fashion": Source(lambda asked: load_idx(asked.spec, asked.path, asked.split, FASHION), "DIR"),
    "folder": Source(lambda asked: load_folder(asked.spec, asked.path, asked.split, asked.size), "DIR", 64),
    "pictures": Source(lambda asked: load_pictures(asked.spec, asked.split, asked.size), size=64),
}
_ways = [name + (f":{source.argument}" if source.argument else "") for name, source in SOURCES.items()]
SPECS = f"{', '.join(_ways[:-1])} or {_ways[-1]}"


def load(spec: str, split: str = "train", size: int | None = None) -> Dataset:
    """Load pictures.

    Args:
        spec: "digits" (shipped: 10,000 + 1,000 of MNIST's), "mnist:DIR" or "fashion:DIR" (a folder with the four IDX files,
            gzipped or not), "folder:DIR" (a folder of pictures; if all lie in subfolders, those are the classes), "pictures"
            (1,900 drawings with names; needs the extra of that name).
        split: "train" or "test". A folder of pictures holds back every tenth for the test, unless it has the subfolders train/
            and test/ itself.
        size: those pictures that have no size of their own are scaled, cropped or drawn to size × size (by default 64).

    Raises ValueError or FileNotFoundError, or ImportError for an extra that is not installed, in one line.
    """
    if split not in ("train", "test"):
        raise ValueError(f'unknown split {split!r}; use "train" or "test"')
    kind, colon, argument = spec.partition(":")
    kind = kind.strip()
    source = SOURCES.get(kind)
    if source is None or (colon and not source.argument):
        if Path(spec).is_dir():
            raise ValueError(f"unknown data {spec!r}; did you mean folder:{spec}? Known: {SPECS}")
        near = get_close_matches(kind.lower(), SOURCES)
        raise ValueError(f"unknown data {spec!r}; {f'did you mean {near[0]}? ' if near else ''}Known: {SPECS}")
    if size is not None and not source.size:
        sized = ", ".join(name for name, other in SOURCES.items() if other.size)
        raise ValueError(f"size={size} applies to {sized} only; {spec!r} has a size of its own")
    path = Path(argument).expanduser()
    if source.argument:
        if not argument:
            raise ValueError(f"{spec!r} names no folder; write {kind}:{source.argument}")
        if not path.is_dir():
            raise FileNotFoundError(f"{spec!r}: no such folder: {path}")
    return source.load(Request(spec, path, split, source.size if size is None else size))
