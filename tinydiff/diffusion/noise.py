"""Noise for samplers: sample i's depends on its own seed, never on the batch around it."""

from collections.abc import Callable, Iterable

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
