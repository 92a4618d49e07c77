"""Fast CPU kernels in Numba, by family. A module is imported when an op first runs one of its kernels."""

from __future__ import annotations

import importlib
from types import ModuleType


class _Missing:  # TEMPORARY until every family has landed
    def __getattr__(self, name):
        return lambda *a, **k: NotImplemented


def __getattr__(name: str) -> ModuleType:
    if name.startswith("__"):
        raise AttributeError(name)
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError:
        return _Missing()
