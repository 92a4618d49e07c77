"""What every source of pictures gives: pictures, whole in memory, with perhaps a class or captions for each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tinydiff.data.captions import Captions


@dataclass(frozen=True, eq=False)
class Dataset:
    """Pictures with, perhaps, a class each.

    Attributes:
        images: uint8 (N, H, W, C), with C = 1 (grey) or 3 (RGB) and N at least 1.
        labels: int64 (N,), each from 0 up to `num_classes`; None when the pictures have no classes.
        name: what was loaded, as it was asked for.
        class_names: by label; empty without labels.
        captions: what is said of each picture; None when nothing is.
        notes: one line for each thing that the user should hear of, such as pictures that could not be read.
    """

    images: np.ndarray
    labels: np.ndarray | None
    name: str
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    captions: Captions | None = None

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
            raise ValueError(f"{self.name}: images must be uint8 (N, H, W, 1 or 3), got {images.dtype} {images.shape}")
        if images.size == 0:
            raise ValueError(f"{self.name} holds no pictures: its images have shape {images.shape}")
        if self.captions is not None and len(self.captions) != len(images):
            raise ValueError(f"{self.name}: {len(images)} images have captions for {len(self.captions)}")
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
