"""Data in folders: the four IDX files of MNIST and its kin, and pictures in any of the usual formats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from tinydiff.data.captions import digit_captions, name_captions
from tinydiff.data.dataset import Dataset
from tinydiff.data.idx import read_idx
from tinydiff.images import read_image, scale

DIGITS = tuple("0123456789")
FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
PICTURES = {".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"}


def load_idx(name: str, folder: Path, split: str, class_names: tuple[str, ...], size: int = 0, prefix: str = "") -> Dataset:
    stem = prefix + ("train" if split == "train" else "t10k")
    images_path = _find(folder, f"{stem}-images-idx3-ubyte")
    labels_path = _find(folder, f"{stem}-labels-idx1-ubyte")
    images, labels = read_idx(images_path), read_idx(labels_path)
    if images.dtype != np.uint8 or images.ndim != 3:
        raise ValueError(f"{images_path} holds {images.dtype} {images.shape}; pictures are uint8 (N, H, W)")
    if labels.dtype != np.uint8 or labels.shape != images.shape[:1]:
        raise ValueError(f"{labels_path} holds {labels.dtype} {labels.shape}; {images_path.name} needs uint8 {images.shape[:1]}")
    images = scale(images[..., None], size) if size else images[..., None]
    return _captioned(Dataset(images, labels.astype(np.int64), name, class_names), split)


def _captioned(data: Dataset, split: str) -> Dataset:
    """With captions made from the names of the classes, if there are any."""
    if data.labels is None:
        return data
    if data.class_names == DIGITS:
        return replace(data, captions=digit_captions(data.labels, split))
    names = [name.replace("_", " ").lower() for name in data.class_names]
    return replace(data, captions=name_captions(names, data.labels, split))


def _find(folder: Path, stem: str) -> Path:
    for name in (f"{stem}.gz", stem):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"no {stem} or {stem}.gz in {folder}; `tinydiff data fetch` downloads MNIST and Fashion-MNIST")


def load_folder(name: str, folder: Path, split: str, size: int) -> Dataset:
    own_splits = (folder / "train").is_dir() and (folder / "test").is_dir()
    root = folder / split if own_splits else folder
    paths = find_pictures(root)
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
    return _captioned(Dataset(np.stack(images), labels, name, tuple(classes) if labelled else (), notes), split)


def find_pictures(root: Path) -> Sequence[Path]:
    """The picture files under `root`, in an order that does not depend on the file system; hidden ones are left out."""
    found = (path for path in root.rglob("*") if path.suffix.lower() in PICTURES and path.is_file())
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(root).parts))
