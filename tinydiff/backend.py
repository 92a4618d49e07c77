"""What an array is on each device, which dtypes exist, and how many threads compute.

An op's definition is plain array code over `xp`, the array module of its inputs: NumPy on "cpu", CuPy on "cuda", and
`tinydiff.simarray` on "cudasim", where NumPy plays the GPU. Arrays cross from one to another by `to_device` and `to_numpy` alone.
"""

from __future__ import annotations

import importlib
import sys
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    Array: TypeAlias = Any
else:

    class Array:
        """Annotates an array of any device (`numpy.ndarray` on the CPU): parameters of an op so marked are its inputs."""


DTYPES = tuple(np.dtype(name) for name in ("float32", "float64", "int64", "int32", "uint8", "bool"))
DEVICES = ("cpu", "cuda", "cudasim")
_MODULES = {"cpu": "numpy", "cuda": "cupy", "cudasim": "tinydiff.simarray"}
_devices: dict[type, str | None] = {np.ndarray: "cpu", float: None, int: None, bool: None, type(None): None}
"""Where arrays of a type live; None for what is no array."""


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
    if device == "cuda":
        _check_gpu()
    return device


@cache
def _check_gpu() -> None:
    """Raise RuntimeError unless CuPy is installed and sees a GPU."""
    try:
        import cupy
    except ImportError as error:
        raise RuntimeError(f"device 'cuda' needs CuPy ({error}): pip install 'tinydiff[cuda]', or use device='cpu'") from None
    try:
        found = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise RuntimeError(
            f"device 'cuda' needs an NVIDIA GPU and its driver ({_words(error)}): install the driver, or use device='cpu'"
        ) from None
    if not found:
        raise RuntimeError("device 'cuda' needs a GPU, and the driver finds none: see CUDA_VISIBLE_DEVICES, or use device='cpu'")


def _words(error: Exception) -> str:
    """CUDA's own words, without the name of the error in front."""
    return str(error).partition(": ")[2] or str(error)


def device_of(array: Any) -> str | None:
    """Where an array lives: "cpu", "cuda" or "cudasim"; None for numbers, lists and whatever else is no array."""
    kind = type(array)
    if kind not in _devices:
        package = kind.__module__.partition(".")[0]
        _devices[kind] = (
            "cpu"
            if issubclass(kind, np.ndarray)
            else "cuda"
            if package == "cupy" and hasattr(kind, "get")
            else "cudasim"
            if kind.__module__ == _MODULES["cudasim"]
            else None
        )
    return _devices[kind]


def module_of(device: str) -> ModuleType:
    """The array module of a device."""
    name = _MODULES[device]
    return sys.modules.get(name) or importlib.import_module(name)


def array_module(*arrays: Array) -> ModuleType:
    """The module whose functions compute on `arrays` (numbers and None are at home everywhere).

    Raises TypeError when they live on different devices.
    """
    owners = {device for a in arrays if (device := device_of(a)) is not None}
    if len(owners) > 1:
        raise TypeError(f"arrays of different devices can't be mixed: {', '.join(sorted(owners))}; move one with .to(device)")
    return module_of(owners.pop() if owners else "cpu")


def to_device(array: Array, device: str) -> Array:
    """The array on `device`: itself if it is there, else a copy."""
    if device_of(array) == device:
        return array
    return to_numpy(array) if device == "cpu" else module_of(device).asarray(to_numpy(array))


def to_numpy(array: Array) -> np.ndarray:
    """The array as a NumPy array: itself if it is one, else a copy on the host."""
    return array if isinstance(array, np.ndarray) else array.get()


def kernels_for(xp: ModuleType) -> str:
    """Whose kernels compute on arrays of `xp`: "numpy", or "cuda" for those that run on a GPU or its simulator."""
    return "numpy" if xp is np else "cuda"


def special(xp: ModuleType) -> ModuleType:
    """The module that has `erf` for arrays of `xp`."""
    if xp is np:
        return importlib.import_module("tinydiff.kernels.special")
    return importlib.import_module("cupyx.scipy.special") if xp.__name__ == "cupy" else xp


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
