"""Arrays of the simulated GPU: NumPy computes, but at their borders they are as strict as CuPy's, and their copies are seen.

This module is the `xp` of the device "cudasim", as `cupy` is that of "cuda". It has those of CuPy's functions that the package
uses, and refuses what CuPy refuses or would answer otherwise: NumPy arrays where its own are due, implicit conversion to NumPy,
clipping without a bound. Results are arrays always, also of no axes. Memory begins at multiples of 512 bytes, as CuPy's pool
gives it, and `empty` is filled with NaN, so that a kernel that leaves an element out is noticed.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from tinydiff import backend

ALIGNMENT = 512


# Copies between the host and the device.


class Copy(NamedTuple):
    """One copy over the border.

    Attributes:
        direction: "to device" or "to host". bytes: how many. line: the caller's, as "file:line".
    """

    direction: str
    bytes: int
    line: str


_observers: list[Callable[[Copy], None]] = []


@contextmanager
def recorded_copies() -> Iterator[list[Copy]]:
    """The list of the copies between host and device that are made inside the block."""
    copies: list[Copy] = []
    _observers.append(copies.append)
    try:
        yield copies
    finally:
        _observers.remove(copies.append)


def _note(direction: str, nbytes: int) -> None:
    if not _observers:
        return
    frame = sys._getframe(2)
    while frame.f_code.co_filename in (__file__, backend.__file__) and frame.f_back is not None:
        frame = frame.f_back
    for observer in tuple(_observers):
        observer(Copy(direction, nbytes, f"{frame.f_code.co_filename}:{frame.f_lineno}"))


# The array.


class MemoryPointer(NamedTuple):
    """Where an array begins; `ptr` as CuPy's `array.data.ptr`."""

    ptr: int


class Device(NamedTuple):
    """Which GPU holds an array: there is one."""

    id: int


class Flags(NamedTuple):
    """What CuPy knows of an array's memory."""

    c_contiguous: bool
    f_contiguous: bool
    owndata: bool


class ndarray:
    """An array of the simulated device. Make one with `asarray`, read it with `get()`.

    Attributes:
        base: the array whose memory it is a view of, or None.
    """

    __slots__ = ("__weakref__", "_host", "base")
    __array_ufunc__ = None  # NumPy's functions and operators refuse it
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, host: np.ndarray, base: ndarray | None = None) -> None:
        self._host, self.base = host, base

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        raise TypeError("an array of cudasim does not become a NumPy array by itself; use .get()")

    def __array_function__(self, function: Callable, types: Any, args: Any, options: Any) -> Any:
        raise TypeError(f"numpy.{function.__name__} got an array of cudasim; use the functions of its own module")

    def __dlpack__(self, **options: Any) -> Any:
        raise BufferError("an array of cudasim has no device that DLPack knows; use .get()")

    @property
    def shape(self) -> tuple[int, ...]:
        return self._host.shape

    @property
    def dtype(self) -> np.dtype:
        return self._host.dtype

    @property
    def ndim(self) -> int:
        return self._host.ndim

    @property
    def size(self) -> int:
        return self._host.size

    @property
    def nbytes(self) -> int:
        return self._host.nbytes

    @property
    def itemsize(self) -> int:
        return self._host.itemsize

    @property
    def strides(self) -> tuple[int, ...]:
        return self._host.strides

    @property
    def data(self) -> MemoryPointer:
        return MemoryPointer(self._host.__array_interface__["data"][0])

    @property
    def device(self) -> Device:
        return Device(0)

    @property
    def flags(self) -> Flags:
        flags = self._host.flags
        return Flags(flags.c_contiguous, flags.f_contiguous, self.base is None)

    @property
    def T(self) -> ndarray:
        return self.transpose()

    def __len__(self) -> int:
        return len(self._host)

    def __repr__(self) -> str:
        return f"<cudasim array of shape {self.shape}, {self.dtype}>"

    # To the host: a copy each.

    def get(self) -> np.ndarray:
        """A copy as a NumPy array."""
        _note("to host", self.nbytes)
        return self._host.copy()

    def set(self, values: np.ndarray) -> None:
        """Overwrite with a NumPy array of the same shape and dtype."""
        if type(values) is not np.ndarray or values.shape != self.shape or values.dtype != self.dtype:
            raise TypeError(f"set() needs a NumPy array of shape {self.shape} and dtype {self.dtype}")
        _note("to device", values.nbytes)
        self._host[...] = values

    def item(self) -> Any:
        """The only element as a Python number."""
        _note("to host", self.itemsize)
        return self._host.item()

    def tolist(self) -> Any:
        """Nested lists of Python numbers."""
        _note("to host", self.nbytes)
        return self._host.tolist()

    def __bool__(self) -> bool:
        return builtins.bool(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __float__(self) -> float:
        return float(self.item())

    # On the device.

    def reshape(self, *shape: Any) -> ndarray:
        return _give(self._host.reshape(*shape), self)

    def transpose(self, *axes: Any) -> ndarray:
        return _give(self._host.transpose(*axes), self)

    def ravel(self) -> ndarray:
        return _give(self._host.ravel(), self)

    def view(self) -> ndarray:
        return _give(self._host.view(), self)

    def copy(self) -> ndarray:
        return _give(self._host.copy())

    def astype(self, dtype: Any, copy: bool = True) -> ndarray:
        return self if not copy and self.dtype == dtype else _give(self._host.astype(dtype))

    def fill(self, value: Any) -> None:
        self._host.fill(_take(value))

    def __getitem__(self, index: Any) -> ndarray:
        return _give(self._host[_take(index)], self)

    def __setitem__(self, index: Any, value: Any) -> None:
        self._host[_take(index)] = _take(value)

    def __iter__(self) -> Iterator[ndarray]:
        return (self[i] for i in range(len(self)))

    def __copy__(self) -> ndarray:
        return self.copy()

    def __deepcopy__(self, memo: Any) -> ndarray:
        return self.copy()


def _take(value: Any) -> Any:
    """What NumPy gets for an argument: our arrays' storage, and what is no array as it is. Raises TypeError for NumPy's own."""
    if isinstance(value, ndarray):
        return value._host
    if isinstance(value, np.ndarray):
        raise TypeError(f"a NumPy array (shape {value.shape}) among arrays of cudasim; move it with asarray() or .to('cudasim')")
    if isinstance(value, tuple | list):
        return type(value)(map(_take, value))
    return value


def _root(array: np.ndarray) -> np.ndarray:
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def _give(result: Any, *inputs: Any) -> ndarray:
    """NumPy's result as an array of ours: a view stays one, anything else lies in memory of its own, aligned."""
    host = np.asarray(result)
    root = _root(host)
    for x in inputs:
        if isinstance(x, ndarray) and _root(x._host) is root:
            return ndarray(host, x if x.base is None else x.base)
    made = _allocate(host.shape, host.dtype)
    made[...] = host
    return ndarray(made)


def _allocate(shape: Any, dtype: Any) -> np.ndarray:
    dtype = np.dtype(dtype)
    shape = (shape,) if isinstance(shape, int | np.integer) else tuple(shape)
    nbytes = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
    buffer = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -buffer.__array_interface__["data"][0] % ALIGNMENT
    buffer[start:] = 255  # a NaN in every float
    return buffer[start : start + nbytes].view(dtype).reshape(shape)


def _operator(name: str, reflected: bool = False) -> Callable:
    function = getattr(np, name)

    def operator(self: ndarray, other: Any) -> ndarray:
        if not isinstance(other, ndarray | np.ndarray | bool | int | float | np.generic):
            return NotImplemented
        left, right = (other, self) if reflected else (self, other)
        return _give(function(_take(left), _take(right)))

    return operator


def _unary(name: str) -> Callable:
    function = getattr(np, name)
    return lambda self: _give(function(self._host))


def _in_place(name: str) -> Callable:
    function = getattr(np, name)

    def operator(self: ndarray, other: Any) -> ndarray:
        function(self._host, _take(other), out=self._host)
        return self

    return operator


_ARITHMETIC = {
    "add": "add",
    "sub": "subtract",
    "mul": "multiply",
    "truediv": "true_divide",
    "floordiv": "floor_divide",
    "mod": "remainder",
    "pow": "power",
    "matmul": "matmul",
    "rshift": "right_shift",
    "and": "bitwise_and",
    "or": "bitwise_or",
    "xor": "bitwise_xor",
}
_COMPARISONS = {"eq": "equal", "ne": "not_equal", "lt": "less", "le": "less_equal", "gt": "greater", "ge": "greater_equal"}
for _short, _name in _ARITHMETIC.items():
    setattr(ndarray, f"__{_short}__", _operator(_name))
    setattr(ndarray, f"__r{_short}__", _operator(_name, reflected=True))
    if _short != "matmul":
        setattr(ndarray, f"__i{_short}__", _in_place(_name))
for _short, _name in _COMPARISONS.items():
    setattr(ndarray, f"__{_short}__", _operator(_name))
for _short, _name in {"neg": "negative", "abs": "absolute", "invert": "invert"}.items():
    setattr(ndarray, f"__{_short}__", _unary(_name))


# Functions.


class _Function:
    """A function of NumPy's on arrays of ours. Raises TypeError for NumPy arrays among the arguments."""

    def __init__(self, function: Callable) -> None:
        self.function, self.__name__, self.__doc__ = function, function.__name__, function.__doc__

    def __call__(self, *args: Any, **options: Any) -> Any:
        inputs = [x for arg in args for x in (arg if isinstance(arg, tuple | list) else (arg,))]
        result = self.function(*map(_take, args), **{name: _take(value) for name, value in options.items()})
        return _give(result, *inputs)

    def at(self, array: ndarray, index: Any, values: Any) -> None:
        """Add at an index that may name an element more than once, in place, as `numpy.add.at`."""
        if not isinstance(self.function, np.ufunc):
            raise AttributeError(f"{self.__name__} is no ufunc and has no at()")
        if array.dtype.name not in ("float32", "float64", "int32"):
            raise TypeError(f"CuPy's add.at knows no {array.dtype}; use float32, float64 or int32")
        self.function.at(array._host, _take(index), _take(values))


_FUNCTIONS = (
    "add subtract multiply true_divide negative power absolute abs sign square sqrt exp expm1 log log1p logaddexp sin cos tanh "
    "maximum minimum equal not_equal less less_equal greater greater_equal logical_and logical_or logical_not isfinite isnan "
    "sum max min argmax argmin cumsum prod all any where take take_along_axis concatenate stack broadcast_to flip pad "
    "matmul einsum reshape transpose moveaxis"
)
_METHODS = "sum max min argmax argmin cumsum prod all any take"


def _method(function: _Function) -> Callable:
    return lambda self, *args, **options: function(self, *args, **options)


for _name in _FUNCTIONS.split():
    globals()[_name] = _Function(getattr(np, _name))
for _name in _METHODS.split():
    setattr(ndarray, _name, _method(globals()[_name]))


def clip(a: ndarray, a_min: Any, a_max: Any) -> ndarray:
    """`numpy.clip`. Raises ValueError without any bound, as CuPy's does."""
    if a_min is None and a_max is None:
        raise ValueError("clip needs a bound: both are None")
    return _give(np.clip(_take(a), _take(a_min), _take(a_max)))


def empty(shape: Any, dtype: Any = float) -> ndarray:
    """An array that nobody wrote yet: NaN, or numbers as odd as integers can be."""
    return ndarray(_allocate(shape, dtype))


def full(shape: Any, fill_value: Any, dtype: Any = None) -> ndarray:
    """`fill_value` everywhere."""
    return _give(np.full(shape, _take(fill_value), dtype))


def zeros(shape: Any, dtype: Any = float) -> ndarray:
    """0 everywhere."""
    return full(shape, 0, dtype)


def ones(shape: Any, dtype: Any = float) -> ndarray:
    """1 everywhere."""
    return full(shape, 1, dtype)


def zeros_like(a: ndarray) -> ndarray:
    """0 everywhere, in the shape and dtype of `a`."""
    return zeros(a.shape, a.dtype)


def empty_like(a: ndarray) -> ndarray:
    """An array that nobody wrote yet, in the shape and dtype of `a`."""
    return empty(a.shape, a.dtype)


def arange(*bounds: Any, dtype: Any = None) -> ndarray:
    """`numpy.arange`, made on the device."""
    return _give(np.arange(*bounds, dtype=dtype))


def tri(N: int, M: int | None = None, k: int = 0, dtype: Any = float) -> ndarray:
    """`numpy.tri`, made on the device."""
    return _give(np.tri(N, M, k, dtype))


class _OpenGrid:
    """`numpy.ogrid`, made on the device."""

    def __getitem__(self, index: Any) -> list[ndarray]:
        grid = np.ogrid[index]
        return [_give(part) for part in (grid if isinstance(grid, tuple | list) else [grid])]


ogrid = _OpenGrid()


def asarray(a: Any, dtype: Any = None) -> ndarray:
    """`a` on the device: itself if it is there already, else a copy of the NumPy array, number or list."""
    if isinstance(a, ndarray):
        return a if dtype is None else a.astype(dtype, copy=False)
    host = np.asarray(a, dtype)
    _note("to device", host.nbytes)
    return _give(host)


def array(obj: Any, dtype: Any = None) -> ndarray:
    """A copy on the device."""
    return obj.copy() if isinstance(obj, ndarray) and dtype in (None, obj.dtype) else asarray(obj, dtype)


def argsort(a: ndarray) -> ndarray:
    """Indices that sort the last axis; equal elements stay in their order, as with CuPy's."""
    return _give(np.argsort(_take(a), kind="stable"))


def ElementwiseKernel(in_params: str, out_params: str, operation: str, name: str = "kernel", preamble: str = "") -> Callable:
    """`cupy.ElementwiseKernel`, compiled by g++ at its first call."""
    from tinydiff.cudasim.elementwise import Loop

    loop = Loop(in_params, out_params, operation, name, preamble)

    def kernel(*arguments: Any, size: int | None = None) -> ndarray:
        outputs = arguments[len(loop.inputs) :]
        result = loop(*map(_take, arguments), size=size)
        return outputs[0] if outputs else _give(result)

    return kernel


def ReductionKernel(
    in_params: str,
    out_params: str,
    map_expr: str,
    reduce_expr: str,
    post_map_expr: str,
    identity: str,
    name: str = "kernel",
    reduce_type: str | None = None,
    preamble: str = "",
) -> Callable:
    """`cupy.ReductionKernel` over all axes, compiled by g++ at its first call."""
    from tinydiff.cudasim.elementwise import Reduction

    reduction = Reduction(in_params, out_params, map_expr, reduce_expr, post_map_expr, identity, name, reduce_type, preamble)
    return lambda *arguments: _give(reduction(*map(_take, arguments)))


def ascontiguousarray(a: ndarray) -> ndarray:
    """`a` in row-major order: itself if it is already."""
    return a if a.flags.c_contiguous else a.copy()


def erf(x: ndarray) -> ndarray:
    """The error function, as `cupyx.scipy.special.erf`."""
    from tinydiff.kernels import special

    return _give(special.erf(_take(x)))
