"""Kernels in the words of `cupy.ElementwiseKernel` and `cupy.ReductionKernel`, run on the host: g++ compiles a loop of the body.

Only what the package's kernels use: parameters such as `T x` (one element), `raw T x` (the whole array, as `x[k]`) and
`int64 n`; the body sees the position `i` in row-major order.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from tinydiff.cudasim import build

_TYPES = {
    "float32": ("float", ctypes.c_float),
    "float64": ("double", ctypes.c_double),
    "int32": ("int", ctypes.c_int),
    "int64": ("long long", ctypes.c_longlong),
    "uint8": ("unsigned char", ctypes.c_ubyte),
    "bool": ("bool", ctypes.c_bool),
}


@dataclass(frozen=True)
class Parameter:
    """One parameter: `type` is a dtype's name, or a letter that stands for the arrays' own."""

    type: str
    name: str
    raw: bool


def parse(text: str) -> list[Parameter]:
    """The parameters that a text such as "raw T x, int64 n" declares. Raises ValueError for anything else."""
    found = []
    for part in filter(None, map(str.strip, text.split(","))):
        match = re.fullmatch(r"(raw )?(\w+) (\w+)", part)
        if not match or not (match[2] in _TYPES or len(match[2]) == 1) or match[3] == "i":
            raise ValueError(f"parameter {part!r}: write it as 'T x', 'raw T x' or 'int64 n'; i is the position")
        found.append(Parameter(match[2], match[3], bool(match[1])))
    return found


class Loop:
    """The kernel. Calling it gives the output, or writes those outputs that it is given."""

    def __init__(self, in_params: str, out_params: str, operation: str, name: str, preamble: str) -> None:
        self.inputs, self.outputs = parse(in_params), parse(out_params)
        self.operation, self.name, self.preamble = operation, name, preamble

    def __call__(self, *arguments: Any, size: int | None = None) -> Any:
        """Inputs (arrays or numbers), perhaps outputs. `size`: how many positions there are, where all arrays are raw.

        Raises TypeError for arrays of other dtypes, ValueError for outputs that are not contiguous.
        """
        parameters = [*self.inputs, *self.outputs]
        values = list(arguments) + [None] * (len(parameters) - len(arguments))
        types = self._types(parameters, values)
        shapes = [v.shape for p, v in zip(parameters, values) if isinstance(v, np.ndarray) and not p.raw]
        shape = np.broadcast_shapes(*shapes) if size is None else (size,)
        passed: list[Any] = []
        kept: list[Any] = []  # alive while the loop runs
        for k, (parameter, value) in enumerate(zip(parameters, values)):
            kind = types.get(parameter.type, parameter.type)
            if k >= len(self.inputs):
                if value is None:
                    values[k] = value = np.empty(self._result_shape(shape), kind)
                if not value.flags.c_contiguous or not value.flags.writeable:
                    raise ValueError(f"{self.name}: {parameter.name} must be contiguous to be written")
            elif isinstance(value, np.ndarray):
                value = np.ascontiguousarray(value if parameter.raw else np.broadcast_to(value, shape))
            passed.append(value.ctypes.data if isinstance(value, np.ndarray) else _TYPES[kind][1](value))
            kept.append(value)
        arrays = tuple(isinstance(v, np.ndarray) for v in values)
        function = _compiled(self._source(parameters, arrays, types))
        function(
            ctypes.c_longlong(int(np.prod(shape, dtype=np.int64))),
            *[ctypes.c_void_p(v) if a else v for a, v in zip(arrays, passed)],
        )
        results = values[len(self.inputs) :]
        return results[0] if len(results) == 1 else tuple(results)

    def _result_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape

    def _loop(self, inputs: str, outputs: str) -> str:
        """The loop, from the declarations of the elements at position i."""
        return f"for (long long i = 0; i < size_; ++i) {{ {inputs} {outputs} {self.operation}; }}"

    def _types(self, parameters: Sequence[Parameter], values: Sequence[Any]) -> dict[str, str]:
        types: dict[str, str] = {}
        for parameter, value in zip(parameters, values):
            if isinstance(value, np.ndarray):
                known = types.setdefault(parameter.type, value.dtype.name) if len(parameter.type) == 1 else parameter.type
                if value.dtype.name != known:
                    raise TypeError(f"{self.name}: {parameter.name} is of {value.dtype}, not {known}")
        return types

    def _source(self, parameters: Sequence[Parameter], arrays: Sequence[bool], types: dict[str, str]) -> str:
        declared = ["long long size_"]
        elements: list[list[str]] = [[], []]  # of inputs, of outputs
        for k, (p, array) in enumerate(zip(parameters, arrays)):
            const = "const " if k < len(self.inputs) else ""
            kind = p.type if p.type in types else _TYPES[p.type][0]
            if not array:
                declared.append(f"{const}{kind} {p.name}")
            elif p.raw:
                declared.append(f"{const}{kind}* {p.name}")
            else:
                declared.append(f"{const}{kind}* all_{p.name}")
                elements[k >= len(self.inputs)].append(f"{const}{kind}& {p.name} = all_{p.name}[i];")
        return "\n".join(
            [
                "#include <cmath>",
                "#define __device__ inline",
                "using namespace std;",
                *(f"typedef {_TYPES[kind][0]} {letter};" for letter, kind in types.items()),
                self.preamble,
                f'extern "C" void kernel({", ".join(declared)}) {{',
                f"    {self._loop(*map(' '.join, elements))}",
                "}",
            ]
        )


class Reduction(Loop):
    """A kernel that reduces all elements to one: `reduce_expr` joins a and b, `post_map_expr` makes the output of a."""

    def __init__(
        self,
        in_params: str,
        out_params: str,
        map_expr: str,
        reduce_expr: str,
        post_map_expr: str,
        identity: str,
        name: str,
        reduce_type: str | None,
        preamble: str,
    ) -> None:
        super().__init__(in_params, out_params, map_expr, name, preamble)
        self.reduce_expr, self.post_map_expr, self.identity = reduce_expr, post_map_expr, identity
        self.reduce_type = reduce_type or self.outputs[0].type

    def _result_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return ()

    def _loop(self, inputs: str, outputs: str) -> str:
        kind = self.reduce_type
        step = f"const {kind} b = {self.operation}; a = {self.reduce_expr};"
        loop = f"for (long long i = 0; i < size_; ++i) {{ {inputs} {step} }}"
        return f"{kind} a = {self.identity}; {loop} const long long i = 0; {outputs} {self.post_map_expr};"


@cache
def _compiled(source: str) -> Any:
    command = [build.compiler(), "-std=c++17", "-O2", "-shared", "-fPIC", "-ffp-contract=off"]
    output = build.cache_folder() / f"elementwise-{build.digest(*command, source)}.so"
    if not output.exists():
        text = output.with_suffix(".cpp")
        text.write_text(source)
        build._run([*command, text], output)
    return ctypes.CDLL(str(output)).kernel
