"""The CUDA kernels of csrc/ as kernels of ops: on CuPy's arrays through `_cuda`, on simulated ones through `_cudasim`.

The path is one down to the launch, where arrays become addresses. What a launcher is handed was checked before: one dtype, rows
in order, one GPU, sizes within 32 bits. On the simulator each launch is watched, and a fault of a kernel raises.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from tinydiff.backend import Array, array_module, device_of
from tinydiff.kernels import convrule

EXTENSIONS = {"cuda": "_cuda", "cudasim": "_cudasim"}
PRECISIONS = ("float32", "tf32", "bf16")
LARGEST = 2**31 - 2**16  # what a kernel's index holds, less what a tile reaches past the end
ALIGNMENT = 16  # bytes that vector loads need

_precision = "float32"
_simulated = True


@contextmanager
def precision(name: str) -> Iterator[None]:
    """Inside the block convolutions of float32 may round their factors to "tf32" or "bf16" for tensor cores.

    Sums stay float32. Raises ValueError for another name.
    """
    global _precision
    if name not in PRECISIONS:
        raise ValueError(f"precision {name!r}: use one of {', '.join(PRECISIONS)}")
    before, _precision = _precision, name
    try:
        yield
    finally:
        _precision = before


@contextmanager
def simulated(wanted: bool) -> Iterator[None]:
    """Inside the block the kernels of cudasim run through the simulator, or don't, and the definitions run, far faster."""
    global _simulated
    before, _simulated = _simulated, wanted
    try:
        yield
    finally:
        _simulated = before


def simulating() -> bool:
    """Whether kernels of cudasim run: see `simulated`."""
    return _simulated


@cache
def extension(device: str) -> ModuleType | None:
    """The compiled launchers of a device; None where they were not built."""
    try:
        return importlib.import_module(f"tinydiff.{EXTENSIONS[device]}")
    except ImportError:
        return None


def launchers(array: Array) -> ModuleType | None:
    """The launchers for where `array` is, or None."""
    device = device_of(array)
    return None if device == "cudasim" and not _simulated else extension(device or "cpu")


# The border.


def check(**arrays: Array | None) -> None:
    """Refuse what a kernel would read wrongly.

    Raises TypeError for dtypes other than float32 and float64, or mixed ones, or arrays of another GPU than the current one;
    ValueError for arrays that are not C-contiguous, too large for indices of 32 bits, or without memory.
    """
    given = {name: a for name, a in arrays.items() if a is not None}
    xp = array_module(*given.values())
    dtypes = {a.dtype.name for a in given.values()}
    if len(dtypes) > 1 or not dtypes <= {"float32", "float64"}:
        described = ", ".join(f"{name} {a.dtype.name}" for name, a in given.items())
        raise TypeError(f"a CUDA kernel needs arrays all of float32 or all of float64, not {described}; use .astype()")
    current = xp.cuda.Device().id if xp.__name__ == "cupy" else 0
    for name, a in given.items():
        if not a.flags.c_contiguous:
            raise ValueError(f"{name} of shape {a.shape} is not C-contiguous; pass xp.ascontiguousarray({name})")
        check_size(name, a.shape)
        if a.size and not a.data.ptr:
            raise ValueError(f"{name} of shape {a.shape} has no memory: it was freed; keep a reference to what it is a view of")
        if a.data.ptr % a.dtype.itemsize:
            raise ValueError(f"{name} begins at an address that is no multiple of {a.dtype.itemsize} bytes; pass {name}.copy()")
        if a.device.id != current:
            raise TypeError(f"{name} is on GPU {a.device.id}, and the current one is {current}; move it there")


def taken(**arrays: Array | None) -> list[Any] | None:
    """The arrays in C order if a kernel can take them, else None: where launchers are, none empty, all of one float dtype.

    Raises as `check` does.
    """
    given = [a for a in arrays.values() if a is not None]
    if launchers(given[0]) is None or any(a.size == 0 for a in given):
        return None
    if len({a.dtype for a in given}) > 1 or given[0].dtype.name not in ("float32", "float64"):
        return None
    ordered = dict(zip(arrays, _contiguous(array_module(*given), *arrays.values())))
    check(**ordered)
    return list(ordered.values())


def exactly(array: Array) -> int:
    """The place of an array's own dtype in enum Precision of csrc/kernels.h."""
    return convrule.PRECISIONS.index(array.dtype.name)


def check_size(name: str, shape: Sequence[int]) -> None:
    """Raise ValueError for a shape whose elements indices of 32 bits can't tell apart."""
    if math.prod(shape) > LARGEST:
        raise ValueError(
            f"{name} of shape {tuple(shape)} has {math.prod(shape)} elements, more than 32 bits index; split the batch"
        )


def allocate(xp: ModuleType, name: str, shape: Sequence[int], dtype: Any) -> Array:
    """An array that nobody wrote yet. Raises MemoryError that says what there is no room for."""
    try:
        return xp.empty(shape, dtype)
    except MemoryError as error:  # CuPy's too
        megabytes = math.prod(shape) * np.dtype(dtype).itemsize / 1e6
        raise MemoryError(f"no room on the GPU for {name}, {megabytes:,.0f} MB ({error}); use a smaller batch") from None


def empty_like(array: Array, name: str, *shape: int) -> Array:
    """What a kernel will write: of `shape`, with the array's dtype, where it is. Raises as `check_size` and `allocate` do."""
    check_size(name, shape)
    return allocate(array_module(array), name, shape, array.dtype)


def aligned(*arrays: Array) -> bool:
    """Whether all begin where vector loads may."""
    return all(a.data.ptr % ALIGNMENT == 0 for a in arrays)


def _address(array: Array | None) -> int:
    return 0 if array is None else array.data.ptr


def _gpu(xp: ModuleType) -> tuple[tuple[int, int], int]:
    """Compute capability and multiprocessors of the current GPU; the simulator stands for an sm_80."""
    if xp.__name__ != "cupy":
        return (8, 0), 108
    device = xp.cuda.Device()
    return (int(device.compute_capability[:-1]), int(device.compute_capability[-1])), device.attributes["MultiProcessorCount"]


class Unsupported(RuntimeError):
    """A version of a kernel was asked for a problem that it can't do."""


def launch(name: str, numbers: Sequence[float], arrays: dict[str, Array | None], written: Sequence[str]) -> None:
    """Run a launcher: its numbers, its arrays by name in its order, then the stream. `written` names those that it changes.

    Raises as `run` does.
    """
    run(name, [*numbers, *map(_address, arrays.values())], arrays, written)


def run(name: str, arguments: Sequence[float], arrays: dict[str, Array | None], written: Sequence[str]) -> None:
    """Run a launcher with all its arguments but the stream; its kernels use `arrays` and nothing else.

    Raises RuntimeError with CUDA's words, or with what the simulator found.
    """
    first: Any = arrays[written[0]]
    module = launchers(first)
    assert module is not None
    function = getattr(module, name)
    if device_of(first) == "cudasim":
        with _watched(arrays, written) as simulator:
            error = function(*arguments, 0)
            findings = simulator.findings()
        if findings:
            from tinydiff.cudasim import KernelError

            raise KernelError(findings)
    else:
        error = function(*arguments, array_module(first).cuda.get_current_stream().ptr)
    if error:
        raise (Unsupported if error == module.UNSUPPORTED else RuntimeError)(f"{name}: {module.error_message(error)}")


@cache
def _simulator() -> Any:
    from tinydiff.cudasim import Simulator

    module = extension("cudasim")
    assert module is not None and module.__file__ is not None
    return Simulator.load(Path(module.__file__))


@contextmanager
def _watched(arrays: dict[str, Array | None], written: Sequence[str]) -> Iterator[Any]:
    """Let kernels use these arrays and nothing else."""
    simulator = _simulator()
    given = {a.data.ptr: (name, a) for name, a in arrays.items() if a is not None and a.size}
    with simulator.settings():
        for address, (name, a) in given.items():
            simulator.track(address, a.nbytes, a.itemsize, name in written, name)
        try:
            yield simulator
        finally:
            for address in given:
                simulator.untrack(address)


# Convolution.


def _contiguous(xp: ModuleType, *arrays: Array | None) -> list[Any]:
    return [a if a is None or a.flags.c_contiguous else xp.ascontiguousarray(a) for a in arrays]


def _convolve(
    direction: str,
    x: Array | tuple[int, ...],
    w: Array | tuple[int, ...],
    y: Array | tuple[int, ...],
    stride: Sequence[int],
    padding: Any,
    bias: Array | None = None,
    residual: Array | None = None,
    activation: str | None = None,
    keep: bool = False,
    force: str | None = None,
) -> Any:
    """One of the three directions; in the place of what it computes stands the shape. NotImplemented where no kernel can.

    With `keep` the result is a pair, with what the activation was applied to. `force` names the version instead of the rule.
    """
    known = [a for a in (x, w, y) if not isinstance(a, tuple)]
    if launchers(known[0]) is None:
        return NotImplemented
    xp = array_module(*known)
    if any(a.dtype != known[0].dtype or a.size == 0 for a in (*known, *[b for b in (bias, residual) if b is not None])):
        return NotImplemented
    shapes = [tuple(a) if isinstance(a, tuple) else a.shape for a in (x, w, y)]
    if known[0].dtype.name not in ("float32", "float64") or 0 in (n for shape in shapes for n in shape):
        return NotImplemented
    (n, height, width, c), (kh, kw, _, o), (_, p, q, _) = shapes
    (top, bottom), (left, right) = padding
    # Kernels step outside of x by the padding, and outside of y by the kernel, before they see that nothing is there.
    check_size("x, padded,", (n, height + top + bottom, width + left + right, c))
    check_size("the result, with the kernel's border,", (n, p + kh, q + kw, o))
    target = {"forward": "y", "input_grad": "x", "weight_grad": "weight"}[direction]
    made = [allocate(xp, target, a, known[0].dtype) if isinstance(a, tuple) else _contiguous(xp, a)[0] for a in (x, w, y)]
    bias, residual = _contiguous(xp, bias, residual)
    check(x=made[0], weight=made[1], y=made[2], bias=bias, residual=residual)
    size = convrule.ConvSize(n, height, width, c, o, kh, kw, p, q, stride[0], stride[1], top, left)
    wanted = "float64" if known[0].dtype == np.float64 else _precision
    capability, multiprocessors = _gpu(xp)
    version, computed = force or "", wanted
    if force is None:
        version, computed = convrule.choose(direction, size, wanted, capability, aligned(*made), multiprocessors)
    numbers = [convrule.VERSIONS.index(version), convrule.DIRECTIONS.index(direction), convrule.PRECISIONS.index(computed), *size]
    module = launchers(made[0])
    assert module is not None
    scratch = module.conv2d_workspace(*numbers, 0)
    workspace = allocate(xp, f"the workspace of {version}", (scratch // 4 + 1,), np.float32)
    before = allocate(xp, "what the activation is applied to", shapes[2], known[0].dtype) if keep else None
    arrays = {"bias": bias, "residual": residual, "before": before}
    arrays |= {"x": made[0], "weight": made[1], "y": made[2], "workspace": workspace}
    per_sample = int(bias is not None and bias.ndim == 2)
    numbers += [0, per_sample, convrule.ACTIVATIONS.index(activation)]
    launch("conv2d", numbers, arrays, [target, "before", "workspace"])
    return (arrays[target], before) if keep else arrays[target]


def conv2d(
    x: Array,
    w: Array,
    bias: Any,
    residual: Any,
    *,
    stride: Any,
    padding: Any,
    activation: str | None = None,
    keep: bool = False,
    force: str | None = None,
) -> Any:
    """See `ops.conv2d`; the arguments are checked there. `keep` and `force` as above."""
    out = tuple((n + sum(around) - k) // s + 1 for n, around, k, s in zip(x.shape[1:3], padding, w.shape[:2], stride))
    shape = (x.shape[0], *out, w.shape[3])
    return _convolve("forward", x, w, shape, stride, padding, bias, residual, activation, keep, force)


def conv2d_input_grad(gy: Array, w: Array, *, input_size: Any, stride: Any, padding: Any, force: str | None = None) -> Any:
    """See `ops.conv2d_input_grad`."""
    return _convolve("input_grad", (gy.shape[0], *input_size, w.shape[2]), w, gy, stride, padding, force=force)


def conv2d_weight_grad(x: Array, gy: Array, *, kernel_size: Any, stride: Any, padding: Any, force: str | None = None) -> Any:
    """See `ops.conv2d_weight_grad`."""
    return _convolve("weight_grad", x, (*kernel_size, x.shape[3], gy.shape[3]), gy, stride, padding, force=force)
