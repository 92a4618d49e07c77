"""Hypothesis draws the same examples every time, few of them and without a clock: a slow machine must not fail a test."""

from hypothesis import settings

import tinydiff.kernels.jit  # noqa: F401 (before any module's own njit: Numba settles how it compiles when it is first used)

settings.register_profile("tinydiff", max_examples=25, deadline=None, derandomize=True, database=None)
settings.load_profile("tinydiff")
