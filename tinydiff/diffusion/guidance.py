"""Classifier-free guidance (Ho & Salimans 2022): u + g·(c − u), away from what the network says when told nothing."""

from collections.abc import Callable
from typing import Any

import numpy as np

from .predictions import Array

# A network: model(x (N, H, W, C), t (N,) float32, condition (N, …)) -> prediction, shaped as x.
Model = Callable[[Array, Array, Any], Array]
# A network whose condition is settled: predict(x, t) with one t for all.
Predict = Callable[[Array, float], Array]


def guide(model: Model, condition: Array, null: Any, scale: float = 1.0) -> Predict:
    """predict(x, t) of `model` for `condition` (N, …), guided by `scale` g.

    `null` is the condition that says nothing (broadcast to the shape of `condition`). At g = 1 the network is evaluated once,
    for the condition alone, and at g = 0 once for `null`; otherwise both go through it as one batch of 2N, nulls first.
    Any kind of prediction may be guided: at one x all of them are linear in each other.
    """
    if not np.isfinite(scale):
        raise ValueError(f"guidance scale = {scale}; give a finite number (1 is no guidance)")
    condition = np.asarray(condition)
    nothing = np.broadcast_to(np.asarray(null, dtype=condition.dtype), condition.shape)

    def predict(x: Array, t: float) -> Array:
        if len(x) != len(condition):
            raise ValueError(f"{len(x)} samples, but {len(condition)} conditions; give one a sample")
        times = np.full(len(x), t, dtype=np.float32)
        if scale == 1:
            return model(x, times, condition)
        if scale == 0:
            return model(x, times, nothing)
        both = model(np.concatenate([x, x]), np.concatenate([times, times]), np.concatenate([nothing, condition]))
        unconditional, conditional = both[: len(x)], both[len(x) :]
        return unconditional + float(scale) * (conditional - unconditional)

    return predict
