"""Noise for samplers: sample i's depends on its own seed, never on the batch around it."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray


def noise_source(seeds: Iterable[int], shape: tuple[int, ...]) -> Callable[[], NDArray[np.float32]]:
    """noise(): at every call the next standard normal array (len(seeds), *shape), float32; every sample has its own generator.

    Raises ValueError for a seed that is not an integer of at least 0.
    """
    generators = []
    for seed in seeds:
        if not isinstance(seed, (int, np.integer)) or seed < 0:
            raise ValueError(f"seed {seed!r}: seeds are integers of at least 0")
        generators.append(np.random.Generator(np.random.Philox(np.random.SeedSequence(int(seed)))))

    def noise() -> NDArray[np.float32]:
        out = np.empty((len(generators), *shape), dtype=np.float32)
        for generator, sample in zip(generators, out):
            sample[...] = generator.standard_normal(shape, dtype=np.float32)
        return out

    return noise


def begin_with(first: NDArray[np.float32], source: Callable[[], NDArray[np.float32]]) -> Callable[[], NDArray[np.float32]]:
    """A source whose first array is `first`; the source's own first is passed over, so what follows is as without it."""
    waiting = [first]

    def noise() -> NDArray[np.float32]:
        drawn = source()
        return waiting.pop() if waiting else drawn

    return noise


def slerp(a: NDArray[np.float32], b: NDArray[np.float32], shares: Sequence[float]) -> NDArray[np.float32]:
    """From a to b along the great circle between them (Shoemake 1985): one array for each share, 0 at a and 1 at b.

    Halfway along the straight line noise has less deviation than noise should; on the circle it keeps it.
    """
    cosine = float(np.vdot(a, b) / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-30))
    angle = np.arccos(np.clip(cosine, -1, 1))
    if np.sin(angle) < 1e-6:  # the same direction, or opposite ones, between which no circle is the nearest
        return np.stack([(1 - s) * a + s * b for s in shares]).astype(np.float32)
    return np.stack([(np.sin((1 - s) * angle) * a + np.sin(s * angle) * b) / np.sin(angle) for s in shares]).astype(np.float32)
