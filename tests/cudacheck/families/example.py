"""The frame's own example: sums over a window."""

from pathlib import Path

import numpy as np

from tests.cudacheck.family import Family, Run
from tests.cudacheck.launchers import Array

HERE = Path(__file__).parent.parent


def window_sums(n: int, radius: int, alignment: int) -> Run:
    x = np.random.default_rng(n).standard_normal(n).astype(np.float32)
    padded = np.pad(x.astype(float), radius)
    expected = np.array([padded[i : i + 2 * radius + 1].sum() for i in range(n)])
    return Run(
        "window_sums",
        [Array("x"), Array("y"), n, radius, 0],
        inputs={"x": x},
        outputs={"y": np.zeros(n, np.float32)},
        expected={"y": (expected, 1e-5)},
        refused=radius > 16,
    )


FAMILIES = [
    Family(
        "example",
        [HERE / "example.cu"],
        HERE / "example.h",
        {"n": (1, 63, 64, 65, 200), "radius": (0, 1, 5, 16, 17)},
        window_sums,
        copies=True,
    )
]
