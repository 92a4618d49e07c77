"""A user's kernels, from source text to calls with NumPy arrays."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinydiff.cudasim import build
from tinydiff.cudasim.simulator import Finding, KernelError, Memory, Requests, Simulator

_NUMBERS: dict[str, tuple[Any, str]] = {  # C++ name: ctypes type, dtype
    "float": (ctypes.c_float, "float32"),
    "double": (ctypes.c_double, "float64"),
    "int": (ctypes.c_int, "int32"),
    "unsigned": (ctypes.c_uint, "uint32"),
    "unsigned int": (ctypes.c_uint, "uint32"),
    "bool": (ctypes.c_bool, "bool"),
    "char": (ctypes.c_char, "int8"),
    "unsigned char": (ctypes.c_ubyte, "uint8"),
    "long long": (ctypes.c_longlong, "int64"),
    "long": (ctypes.c_long, "int64"),
    "size_t": (ctypes.c_size_t, "uint64"),
    **{
        f"{sign}int{bits}_t": (getattr(ctypes, f"c_{sign}int{bits}"), f"{sign}int{bits}")
        for sign in ("", "u")
        for bits in (8, 16, 32, 64)
    },
}
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_KERNEL = re.compile(r"(template\s*<[^>]*>\s*)?\b(?:KERNEL_BOUNDS\s*\([^)]*\)|KERNEL\s+void)\s+(\w+)\s*\(([^)]*)\)")


@dataclass(frozen=True)
class Parameter:
    name: str
    type: str  # of the element, for a pointer
    pointer: bool
    writable: bool


def parse(source: str) -> dict[str, list[Parameter]]:
    """The kernels of a source and their parameters; templates are left out, for they have no one type."""
    found: dict[str, list[Parameter]] = {}
    for template, name, parameters in _KERNEL.findall(_COMMENT.sub(" ", source)):
        if not template:
            found[name] = [_parameter(text, name) for text in parameters.split(",") if text.strip()]
    return found


def _parameter(text: str, kernel: str) -> Parameter:
    plain = re.sub(r"\b__restrict__\b", " ", text)
    match = re.fullmatch(r"\s*(const\s+)?([\w ]+?)\s*(const\s*)?(\*?)\s*(const\s+)?(\w+)\s*", plain)
    kind = re.sub(r"\s+", " ", match[2]) if match else ""
    if not match or kind not in _NUMBERS:
        raise ValueError(
            f"kernel {kernel} takes {text.strip()!r}: only numbers and pointers to numbers ({', '.join(_NUMBERS)}) can be passed"
        )
    return Parameter(match[6], kind, bool(match[4]), bool(match[4]) and not (match[1] or match[3]))


def _launchers(source: Path, kernels: dict[str, list[Parameter]]) -> str:
    """The translation unit: the user's source, and a C function that launches each of its kernels."""
    lines = [f'#include "{source}"', "", '#define EXPORT extern "C" __attribute__((visibility("default")))']
    for name, parameters in kernels.items():
        declared = "".join(f", {_declaration(p)}" for p in parameters)
        passed = "".join(f", {p.name}" for p in parameters)
        lines += [
            f"EXPORT int launch_{name}(const unsigned* dims, size_t shared{declared}) {{",
            "    const dim3 grid(dims[0], dims[1], dims[2]), block(dims[3], dims[4], dims[5]);",
            f"    return LAUNCH({name}, grid, block, shared, 0{passed});",
            "}",
        ]
    return "\n".join(lines) + "\n"


def _declaration(parameter: Parameter) -> str:
    const = "const " if parameter.pointer and not parameter.writable else ""
    return f"{const}{parameter.type}{'*' if parameter.pointer else ''} {parameter.name}"


def compile(source: str | Path, *, races: bool = True) -> Kernels:
    """Load CUDA kernels written against csrc/launch.h: a path, or the source itself (whatever has a line break in it).

    Every kernel that is no template becomes an attribute: `kernels.scale(x, y, 2.0, n, grid=4, block=256)`. With `races=False`
    the compiler does not report every access: some ten times as fast, and blind to races and to plain reads out of bounds.
    Raises RuntimeError without g++, CompileError with what g++ said, ValueError where there is no kernel to call.
    """
    if isinstance(source, str) and "\n" in source:
        path = build.cache_folder() / build.digest(source) / "kernel.cu"
        path.parent.mkdir(exist_ok=True)
        path.write_text(source)
        text = source
    else:
        path = Path(source).resolve()
        text = path.read_text()
    found = parse(text)
    if not found:
        raise ValueError(f"{path.name} has no kernel: KERNEL void name(...), no template, is what can be called")
    how = "checked" if races else "fast"
    unit = _launchers(path, found)
    compiled = build.kernel_object(path, how, unit + f"// {build.digest(text)}\n")
    return Kernels(Simulator.load(build.link([compiled], how)), found)


class Kernels:
    """The kernels of one source, by name."""

    def __init__(self, simulator: Simulator, kernels: dict[str, list[Parameter]]) -> None:
        self.simulator = simulator
        self._kernels = {name: Kernel(simulator, name, parameters) for name, parameters in kernels.items()}

    def __getattr__(self, name: str) -> Kernel:
        if name.startswith("_") or name not in self._kernels:
            raise AttributeError(f"no kernel {name!r}; there are: {', '.join(self._kernels)}")
        return self._kernels[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._kernels)


Size = int | Sequence[int]


class Kernel:
    """One kernel. Calling it runs it on NumPy arrays, which it changes as it would change device memory."""

    def __init__(self, simulator: Simulator, name: str, parameters: list[Parameter]) -> None:
        self.simulator, self.name, self.parameters = simulator, name, parameters
        self._function = getattr(simulator.library, f"launch_{name}")
        self._function.argtypes = [
            ctypes.c_void_p,
            ctypes.c_size_t,
            *(ctypes.c_void_p if p.pointer else _NUMBERS[p.type][0] for p in parameters),
        ]

    def __call__(self, *arguments: Any, grid: Size, block: Size, shared: int = 0, **settings: Any) -> None:
        """Run it once; `settings` are those of `Simulator.settings`.

        Arrays must be contiguous and of the parameter's dtype. Raises KernelError with all that was found.
        """
        findings, _ = self._run(arguments, grid, block, shared, settings)
        if findings:
            raise KernelError(findings)

    def check(self, *arguments: Any, grid: Size, block: Size, shared: int = 0, seeds: int = 3) -> None:
        """Run it in every order and with asynchronous copies early and late: all must find nothing and agree to the bit.

        Each run starts from the arrays as they were given; afterwards they hold the result. Raises KernelError.
        """
        start = [a.copy() if isinstance(a, np.ndarray) else a for a in arguments]
        first: list[Any] | None = None
        for schedule, seed in [("forward", 0), ("reverse", 0), ("warp", 0), *(("random", seed) for seed in range(seeds))]:
            for late in (True, False):
                trial = [a.copy() if isinstance(a, np.ndarray) else a for a in start]
                settings = {"schedule": schedule, "seed": seed, "late_copies": late}
                findings, _ = self._run(trial, grid, block, shared, settings)
                if findings:
                    raise KernelError(findings)
                if first is None:
                    first = trial
                for parameter, one, other in zip(self.parameters, first, trial, strict=True):
                    if parameter.writable and one.tobytes() != other.tobytes():
                        how = f"schedule {schedule!r}, seed {seed}, {'late' if late else 'early'} copies"
                        message = f"{parameter.name} differs between the forward schedule and {how}"
                        raise KernelError([Finding("order", message, "", "", self.name)])
        for given, result in zip(arguments, first or [], strict=True):
            if isinstance(given, np.ndarray):
                given[...] = result

    def requests(self, *arguments: Any, grid: Size, block: Size, shared: int = 0, **settings: Any) -> list[Requests]:
        """Run it once and return what its accesses through the launch header cost, line by line."""
        findings, requests = self._run(arguments, grid, block, shared, {**settings, "record": True})
        if findings:
            raise KernelError(findings)
        return requests

    def _run(
        self, arguments: Sequence[Any], grid: Size, block: Size, shared: int, settings: dict[str, Any]
    ) -> tuple[list[Finding], list[Requests]]:
        if len(arguments) != len(self.parameters):
            raise TypeError(f"{self.name} takes {len(self.parameters)} arguments, not {len(arguments)}")
        memory: dict[int, tuple[str, Memory, bool]] = {}
        values: list[Any] = []
        for parameter, argument in zip(self.parameters, arguments, strict=True):
            if not parameter.pointer:
                values.append(_number(self.name, parameter, argument))
                continue
            array = _array(self.name, parameter, argument)
            name, piece, writable = memory.get(id(array)) or (parameter.name, Memory(array), False)
            memory[id(array)] = (name, piece, writable or parameter.writable)
            values.append(piece.pointer)
        dims = (ctypes.c_uint * 6)(*_three("grid", grid), *_three("block", block))
        with self.simulator.settings(**settings), self.simulator.tracked(list(memory.values())):
            self._function(ctypes.addressof(dims), shared, *values)
            findings, requests = self.simulator.findings(), self.simulator.requests()
        for argument in arguments:
            if id(argument) in memory:
                name, piece, writable = memory[id(argument)]
                if writable:
                    argument[...] = piece.array
                if damage := piece.damage():
                    findings.append(Finding("bounds", f"{name} was written {damage}", "", "", self.name))
        return findings, requests


def _number(kernel: str, parameter: Parameter, value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool | int) or (isinstance(value, float) and parameter.type in ("float", "double")):
        return value
    raise TypeError(f"{kernel}: {parameter.name} is a {parameter.type}, not {type(value).__name__}")


def _array(kernel: str, parameter: Parameter, value: Any) -> np.ndarray:
    dtype = np.dtype(_NUMBERS[parameter.type][1])
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{kernel}: {parameter.name} must be a NumPy array of {dtype}, not {type(value).__name__}")
    if value.dtype != dtype:
        raise TypeError(f"{kernel}: {parameter.name} must be of {dtype}, not {value.dtype}: use x.astype(np.{dtype})")
    if not value.flags.c_contiguous:
        raise ValueError(f"{kernel}: {parameter.name} is not contiguous: use np.ascontiguousarray(x)")
    if parameter.writable and not value.flags.writeable:
        raise ValueError(f"{kernel}: {parameter.name} is written by the kernel, and the array is read-only")
    return value


def _three(name: str, size: Size) -> tuple[int, int, int]:
    sizes = (size,) if isinstance(size, int) else tuple(size)
    if not 1 <= len(sizes) <= 3 or any(not isinstance(n, int) or not 0 < n < 2**31 for n in sizes):
        raise ValueError(f"{name} must be one to three positive integers, not {size!r}")
    return (*sizes, 1, 1)[:3]  # type: ignore[return-value]
