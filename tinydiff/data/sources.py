"""`load`: pictures by what one calls them, such as "digits" or "folder:DIR"."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tinydiff.data.dataset import Dataset
from tinydiff.data.folders import DIGITS, FASHION, load_folder, load_idx
from tinydiff.data.pairs import load_pairs
from tinydiff.data.pictures import load_pictures
from tinydiff.data.shapes import load_shapes
from tinydiff.names import suggestion

SHIPPED = Path(__file__).parent / "shipped"
MOST = 1_000_000


@dataclass(frozen=True)
class Request:
    """What was asked for: `spec` is all of it, `argument` what stands after its colon, `size` the pictures' height and width
    (0: as they are)."""

    spec: str
    argument: str
    split: str
    size: int

    @property
    def path(self) -> Path:
        """The file or folder that is named after the colon. Raises ValueError if nothing is."""
        if not self.argument:
            kind = self.spec.partition(":")[0]
            raise ValueError(f"{self.spec!r} names no folder; write {SOURCES[kind].form}")
        return Path(self.argument).expanduser()

    @property
    def folder(self) -> Path:
        """As `path`. Raises FileNotFoundError if it is no folder."""
        if not self.path.is_dir():
            raise FileNotFoundError(f"{self.spec!r}: no such folder: {self.path}")
        return self.path

    @property
    def count(self) -> int | None:
        """The number after the colon, if there is one. Raises ValueError for anything else."""
        if not self.argument:
            return None
        if not self.argument.isdecimal() or not 0 < int(self.argument) <= MOST:
            raise ValueError(f"{self.spec!r}: after the colon stands how many there are to be, from 1 to {MOST:,}")
        return int(self.argument)


@dataclass(frozen=True)
class Source:
    """How pictures of one kind are loaded.

    Attributes:
        load: gives the Dataset.
        form: how the spec is written, such as "mnist:DIR".
        size: how high and wide pictures are made where no size is given; 0 leaves them the size they have.
    """

    load: Callable[[Request], Dataset]
    form: str
    size: int = 0


SOURCES = {
    "digits": Source(lambda asked: load_idx(asked.spec, SHIPPED, asked.split, DIGITS, asked.size, "digits-"), "digits"),
    "shapes": Source(lambda asked: load_shapes(asked.spec, asked.split, asked.size, asked.count), "shapes[:N]", 32),
    "pictures": Source(lambda asked: load_pictures(asked.spec, asked.split, asked.size), "pictures", 64),
    "page": Source(lambda asked: load_pairs(asked.spec, SHIPPED / "page" / "index.html", asked.split, asked.size), "page", 64),
    "pairs": Source(lambda asked: load_pairs(asked.spec, asked.path, asked.split, asked.size), "pairs:PAGE.html", 64),
    "mnist": Source(lambda asked: load_idx(asked.spec, asked.folder, asked.split, DIGITS, asked.size), "mnist:DIR"),
    "fashion": Source(lambda asked: load_idx(asked.spec, asked.folder, asked.split, FASHION, asked.size), "fashion:DIR"),
    "folder": Source(lambda asked: load_folder(asked.spec, asked.folder, asked.split, asked.size), "folder:DIR", 64),
}
_forms = [source.form for source in SOURCES.values()]
SPECS = f"{', '.join(_forms[:-1])} or {_forms[-1]}"


def load(spec: str, split: str = "train", size: int | None = None) -> Dataset:
    """Load pictures.

    Args:
        spec: "digits" (shipped: 10,000 + 1,000 of MNIST's), "mnist:DIR" or "fashion:DIR" (a folder with the four IDX files,
            gzipped or not), "folder:DIR" (a folder of pictures; if all lie in subfolders, those are the classes), "pictures"
            (1,900 drawings with names; needs the extra of that name), "shapes" or "shapes:N" (N scenes of coloured shapes,
            by default 20,000, and a tenth as many for the test), "page" (60 shipped drawings with captions),
            "pairs:PAGE.html" or "pairs:DIR" (what a saved web page, or a folder of them, shows with an alt text).
        split: "train" or "test". A folder of pictures holds back every tenth for the test, unless it has the subfolders train/
            and test/ itself.
        size: pictures are scaled and cropped, or drawn, to size × size (by default 64, shapes 32, and IDX files as they are).

    Raises ValueError or FileNotFoundError, or ImportError for an extra that is not installed, in one line.
    """
    if split not in ("train", "test"):
        raise ValueError(f'unknown split {split!r}; use "train" or "test"')
    kind, colon, argument = spec.partition(":")
    source = SOURCES.get(kind)
    if source is None or (colon and source.form == kind):
        if Path(spec).is_dir():
            raise ValueError(f"unknown data {spec!r}; did you mean folder:{spec}? Known: {SPECS}")
        raise ValueError(f"unknown data {spec!r}: {suggestion(kind.lower(), SOURCES)} (Known: {SPECS})")
    if size is not None and size < 1:
        raise ValueError(f"size={size}: pictures are at least 1 pixel high and wide")
    return source.load(Request(spec, argument, split, source.size if size is None else size))
