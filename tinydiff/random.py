"""One default random generator, so that a seed fixes everything and a checkpointed region can be run again alike.

What is drawn by the element (dropout) comes from counters: `bits` is a function of (seed, position), which any device computes
where the elements are.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tinydiff.backend import Array

# Of SplitMix64 (Steele, Lea & Flood 2014): its counter's step, and the multipliers that mix it.
STEP, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB

_generator = np.random.default_rng(0)


def manual_seed(seed: int) -> None:
    """Restart the default generator (dropout, initialisers) from `seed`."""
    global _generator
    _generator = np.random.default_rng(seed)


def generator() -> np.random.Generator:
    """The default generator."""
    return _generator


def get_state() -> dict[str, Any]:
    """The default generator's state, plain data."""
    return dict(_generator.bit_generator.state)


def set_state(state: dict[str, Any]) -> None:
    """Continue from a state that `get_state` returned."""
    _generator.bit_generator.state = state


def draw_seed(rng: np.random.Generator | None = None) -> int:
    """A seed for `bits`, below 2⁶³, drawn from `rng` or the default generator."""
    return int((rng or _generator).integers(2**63))


def bits(xp: Any, count: int, seed: int) -> Array:
    """The first `count` numbers (uint64) that SplitMix64 draws from `seed`."""
    z = xp.arange(1, count + 1, dtype=np.uint64) * np.uint64(STEP) + np.uint64(seed)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(FIRST)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(SECOND)
    return z ^ (z >> np.uint64(31))
