"""AdamW and the moving average as the CUDA kernel of csrc/adamw.cu: all parameters in one pass, for few launches."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

from tinydiff.kernels import cuda

NAMES = ("parameter", "gradient", "m", "v", "average")


def adamw(
    changes: Sequence[Sequence[Any]],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    ema_decay: float = 1.0,
) -> list[Sequence[Any]]:
    """One step of AdamW (Loshchilov & Hutter 2017), in place; `step` counts from 1.

    changes: for each parameter its array, gradient, m, v, and moving average or None. Returns, unchanged, those that are not
    float32 throughout, or not on the first's device; gradients may lie in any order, the others are C-contiguous.
    """
    table, declined = array("q"), []
    arrays: dict[str, Any] = {}
    for i, change in enumerate(changes):
        given = cuda.taken(**dict(zip(NAMES, change)))
        in_place = given is not None and all(a is b for k, (a, b) in enumerate(zip(given, change)) if k != 1)
        if not in_place or change[0].dtype.name != "float32" or change[0].shape != change[1].shape:
            declined.append(change)
            continue
        assert given is not None
        table.extend([*(0 if a is None else a.data.ptr for a in given), change[0].size])
        arrays |= {f"{name} {i}": a for name, a in zip(NAMES, given) if a is not None}
    if arrays:
        rates = [lr, beta1, beta2, eps, weight_decay, beta1**step, beta2**step, ema_decay]
        written = [name for name in arrays if not name.startswith("gradient")]
        cuda.run("adamw", [len(table) // (len(NAMES) + 1), table.buffer_info()[0], *map(float, rates)], arrays, written)
    return declined
