"""What an array is on each device, which dtypes exist, and how many threads compute.

An op's definition is plain array code over `xp`, the array module of its inputs: NumPy here, CuPy on a GPU.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    Array: TypeAlias = Any
else:

    class Array:
        """Annotates an array of any device (`numpy.ndarray` on the CPU): parameters of an op so marked are its inputs."""


DTYPES = tuple(np.dtype(name) for name in ("float32", "float64", "int64", "int32", "uint8", "bool"))
DEVICES = ("cpu", "cuda")


def check_dtype(dtype: Any) -> np.dtype:
    """The NumPy dtype that `dtype` names. Raises TypeError for one that tensors don't have."""
    try:
        found = np.dtype(dtype) if dtype is not None else None
    except TypeError:
        found = None
    if found is None or found not in DTYPES:
        names = ", ".join(d.name for d in DTYPES)
        raise TypeError(f"dtype {dtype!r} is not one a tensor can have; use one of {names}")
    return found


def check_device(device: str | None) -> str:
    """The device's name, "cpu" for None. Raises ValueError for an unknown one, RuntimeError for one that isn't there."""
    if device in (None, "cpu"):
        return "cpu"
    if device not in DEVICES:
        raise ValueError(f"unknown device {device!r}; use one of {', '.join(DEVICES)}")
    raise RuntimeError(f"device {device!r} is not available in this version; use device='cpu'")


def array_module(*arrays: Array) -> ModuleType:
    """The module whose functions compute on `arrays` (numbers and None are at home everywhere).

    Raises TypeError when they live on different devices.
    """
    owners = {type(a).__module__.partition(".")[0] for a in arrays if hasattr(a, "__array_namespace__")}
    if len(owners) > 1:
        raise TypeError(f"arrays of different devices can't be mixed: {', '.join(sorted(owners))}; move one with .to(device)")
    owner = owners.pop() if owners else "numpy"
    return sys.modules.get(owner) or importlib.import_module(owner)


def set_num_threads(count: int) -> None:
    """Let `count` threads of the one pool (see `kernels.jit`) compute. Raises ValueError below 1 or above the pool."""
    import numba

    from tinydiff.kernels import jit  # noqa: F401 (starts the pool)

    limit = numba.config.NUMBA_NUM_THREADS
    if not 1 <= count <= limit:
        raise ValueError(
            f"set_num_threads({count}): use 1 to {limit} (NUMBA_NUM_THREADS sets the limit before the first kernel runs)"
        )
    numba.set_num_threads(count)


def get_num_threads() -> int:
    """How many threads the kernels use."""
    import numba

    from tinydiff.kernels import jit  # noqa: F401 (starts the pool)

    return numba.get_num_threads()
