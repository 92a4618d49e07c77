"""Which samples a training step sees: a pure function of the step, so that resuming needs no more than the step's number."""

from __future__ import annotations

from functools import lru_cache

import numpy as np


def batch_indices(n: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Indices (batch_size,), int64, of the samples of training step `step`, counted from 0.

    The steps cut up one endless stream, a permutation of the n samples for each epoch; a batch may span two epochs, so that every
    sample is seen once an epoch whatever the batch size.
    """
    for name, value, least in (("n", n, 1), ("batch_size", batch_size, 1), ("seed", seed, 0), ("step", step, 0)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    first = step * batch_size
    last = first + batch_size
    parts = []
    for epoch in range(first // n, -(-last // n)):
        start = epoch * n
        parts.append(_permutation(n, seed, epoch)[max(first - start, 0) : last - start])
    return np.concatenate(parts)


@lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    # A bit generator's raw stream is fixed for good, while what `Generator.permutation` makes of it may change between NumPy
    # versions, and a run must resume alike under a newer one.
    keys = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(n)
    return np.argsort(keys, kind="stable")
