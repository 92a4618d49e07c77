"""`load("digits")`, `load("mnist:DIR")`, `load("fashion:DIR")`, `load("folder:DIR")`: labelled pictures, whole in memory."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinydiff.data.idx import read_idx
from tinydiff.images import read_image

DIGITS = tuple("0123456789")
FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
SHIPPED = Path(__file__).parent / "shipped"
PICTURES = {".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"}
FOLDER_SIZE = 64
SPECS = "digits, mnist:DIR, fashion:DIR or folder:DIR"


@dataclass(frozen=True, eq=False)
class Dataset:
    """Pictures with, perhaps, a class each.

    Attributes:
        images: uint8 (N, H, W, C), with C = 1 (grey) or 3 (RGB) and N at least 1.
        labels: int64 (N,), each from 0 up to `num_classes`; None when the pictures have no classes.
        name: what was loaded, as it was asked for.
        class_names: by label; empty without labels.
        notes: one line for each thing that the user should hear of, such as pictures that could not be read.
    """

    images: np.ndarray
    labels: np.ndarray | None
    name: str
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
            raise ValueError(f"{self.name}: images must be uint8 (N, H, W, 1 or 3), got {images.dtype} {images.shape}")
        if images.size == 0:
            raise ValueError(f"{self.name} holds no pictures: its images have shape {images.shape}")
        if labels is None:
            return
        if labels.dtype != np.int64 or labels.shape != (len(images),):
            raise ValueError(f"{self.name}: {len(images)} images need as many int64 labels, got {labels.dtype} {labels.shape}")
        if labels.min() < 0 or labels.max() >= self.num_classes:
            raise ValueError(
                f"{self.name}: labels run from {labels.min()} to {labels.max()}, but there are {self.num_classes} classes"
            )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_classes(self) -> int:
        """How many classes there are; 0 without labels."""
        return len(self.class_names)


def load(spec: str, split: str = "train", size: int | None = None) -> Dataset:
    """Load pictures.

    Args:
        spec: "digits" (shipped: 10,000 + 1,000 of MNIST's), "mnist:DIR" or "fashion:DIR" (a folder with the four IDX files,
            gzipped or not), "folder:DIR" (a folder of pictures; if all lie in subfolders, those are the classes).
        split: "train" or "test". A folder of pictures holds back every tenth for the test, unless it has the subfolders train/
            and test/ itself.
        size: a folder's pictures are scaled and cropped to size × size (by default 64).

    Raises ValueError or FileNotFoundError, in one line.
    """
    if split not in ("train", "test"):
        raise ValueError(f'unknown split {split!r}; use "train" or "test"')
    kind, colon, folder = spec.partition(":")
    kind = kind.strip()
    if size is not None and kind != "folder":
        raise ValueError(f"size={size} applies to folder:DIR only; {spec!r} has a size of its own")
    if kind == "digits" and not colon:
        return _load_idx(spec, SHIPPED, split, DIGITS, prefix="digits-")
    if kind in ("mnist", "fashion", "folder"):
        if not folder:
            raise ValueError(f"{spec!r} names no folder; write {kind}:DIR")
        path = Path(folder).expanduser()
        if not path.is_dir():
            raise FileNotFoundError(f"{spec!r}: no such folder: {path}")
        if kind == "folder":
            return _load_folder(spec, path, split, FOLDER_SIZE if size is None else size)
        return _load_idx(spec, path, split, DIGITS if kind == "mnist" else FASHION)
    if Path(spec).is_dir():
        raise ValueError(f"unknown data {spec!r}; did you mean folder:{spec}? Known: {SPECS}")
    near = difflib.get_close_matches(kind.lower(), ["digits", "mnist", "fashion", "folder"])
    raise ValueError(f"unknown data {spec!r}; {f'did you mean {near[0]}? ' if near else ''}Known: {SPECS}")


def _load_idx(name: str, folder: Path, split: str, class_names: tuple[str, ...], prefix: str = "") -> Dataset:
    stem = prefix + ("train" if split == "train" else "t10k")
    images_path = _find(folder, f"{stem}-images-idx3-ubyte")
    labels_path = _find(folder, f"{stem}-labels-idx1-ubyte")
    images, labels = read_idx(images_path), read_idx(labels_path)
    if images.dtype != np.uint8 or images.ndim != 3:
        raise ValueError(f"{images_path} holds {images.dtype} {images.shape}; pictures are uint8 (N, H, W)")
    if labels.dtype != np.uint8 or labels.shape != images.shape[:1]:
        raise ValueError(f"{labels_path} holds {labels.dtype} {labels.shape}; {images_path.name} needs uint8 {images.shape[:1]}")
    return Dataset(images[..., None], labels.astype(np.int64), name, class_names)


def _find(folder: Path, stem: str) -> Path:
    for name in (f"{stem}.gz", stem):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"no {stem} or {stem}.gz in {folder}; `tinydiff data fetch` downloads MNIST and Fashion-MNIST")


def _load_folder(name: str, folder: Path, split: str, size: int) -> Dataset:
    own_splits = (folder / "train").is_dir() and (folder / "test").is_dir()
    root = folder / split if own_splits else folder
    paths = _pictures(root)
    if not paths:
        raise ValueError(f"{name}: no pictures in {root} ({', '.join(sorted(PICTURES))})")
    classes = sorted({path.relative_to(root).parts[0] for path in paths if path.parent != root})
    labelled = all(path.parent != root for path in paths)
    if not own_splits:
        paths = [path for index, path in enumerate(paths) if (index % 10 == 9) == (split == "test")]
        if not paths:
            raise ValueError(f"{name}: every tenth picture is held back for the test, and {root} has fewer than ten")
    images, kept, broken = [], [], []
    for path in paths:
        try:
            images.append(read_image(path, size))
            kept.append(path)
        except (ValueError, OSError) as error:
            broken.append(str(error))
    if not images:
        raise ValueError(f"{name}: none of the {len(paths)} pictures in {root} can be read; the first: {broken[0]}")
    labels = np.array([classes.index(path.relative_to(root).parts[0]) for path in kept], np.int64) if labelled else None
    notes = (f"{len(broken)} of {len(paths)} pictures were skipped; the first: {broken[0]}",) if broken else ()
    return Dataset(np.stack(images), labels, name, tuple(classes) if labelled else (), notes)


def _pictures(root: Path) -> Sequence[Path]:
    """The picture files under `root`, in an order that does not depend on the file system; hidden ones are left out."""
    found = (path for path in root.rglob("*") if path.suffix.lower() in PICTURES and path.is_file())
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(root).parts))
