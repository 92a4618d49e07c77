"""Cut the shipped digit set from the MNIST files: python scripts/make_digits.py MNIST_FOLDER

10,000 of the 60,000 training pictures and 1,000 of the 10,000 test pictures, as many of each digit, evenly spaced over the files
(MNIST's writers change along a file: its first half is cleaner) and in their order. The same files give the same bytes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from tinydiff.data import SHIPPED, load, write_idx


def balanced_subset(labels: np.ndarray, per_class: int) -> np.ndarray:
    """Sorted indices with `per_class` samples of each label, evenly spaced among those of the label."""
    chosen = []
    for label in np.unique(labels):
        places = np.flatnonzero(labels == label)
        chosen.append(places[np.arange(per_class) * len(places) // per_class])
    return np.sort(np.concatenate(chosen))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="the folder with the four MNIST IDX files")
    parser.add_argument("--out", type=Path, default=SHIPPED)
    arguments = parser.parse_args()
    for split, stem, per_class in (("train", "train", 1000), ("test", "t10k", 100)):
        whole = load(f"mnist:{arguments.folder}", split)
        assert whole.labels is not None
        chosen = balanced_subset(whole.labels, per_class)
        write_idx(arguments.out / f"digits-{stem}-images-idx3-ubyte.gz", whole.images[chosen, :, :, 0])
        write_idx(arguments.out / f"digits-{stem}-labels-idx1-ubyte.gz", whole.labels[chosen].astype(np.uint8))


if __name__ == "__main__":
    main()
