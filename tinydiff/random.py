"""One default random generator, so that a seed fixes everything and a checkpointed region can be run again alike."""

from __future__ import annotations

from typing import Any

import numpy as np

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
