"""The error function for NumPy arrays, which NumPy itself does not have."""

from __future__ import annotations

import math

import numba
import numpy as np

from tinydiff.kernels import jit  # noqa: F401 (how Numba compiles is settled before it first does)


@numba.vectorize(["float32(float32)", "float64(float64)"], cache=True)
def erf(x):  # type: ignore[no-untyped-def]
    """erf(x), elementwise, through the C library's (about 1 ulp), in float32 or float64."""
    return math.erf(x)


__all__ = ["erf", "np"]
