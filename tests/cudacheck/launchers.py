"""The launchers of some sources on the simulator: called in this process, or in a program that a sanitizer watches."""

from __future__ import annotations

import ctypes
import re
import struct
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinydiff.cudasim import Simulator, build

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_DECLARATION = re.compile(r"\b(int|int64_t)\s+(\w+)\s*\(([^)]*)\)\s*;")
_INTEGERS = {
    "int": ("i", ctypes.c_int),
    "unsigned": ("i", ctypes.c_uint),
    "bool": ("i", ctypes.c_bool),
    "int64_t": ("i", ctypes.c_int64),
    "long long": ("i", ctypes.c_longlong),
    "size_t": ("i", ctypes.c_size_t),
    "uintptr_t": ("i", ctypes.c_size_t),
    "float": ("f", ctypes.c_float),
    "double": ("f", ctypes.c_double),
}


@dataclass(frozen=True)
class Array:
    """The address of one of a run's arrays, as an argument."""

    name: str


@dataclass(frozen=True)
class Table:
    """Numbers and addresses of arrays in the host's memory, 8 bytes each, as an argument: a pointer to them."""

    entries: Sequence[int | Array]


def declarations(header: Path) -> dict[str, list[str]]:
    """The launchers a header declares, with the types of their parameters."""
    text = _COMMENT.sub(" ", header.read_text())
    return {name: [_type(p) for p in parameters.split(",") if p.strip()] for _, name, parameters in _DECLARATION.findall(text)}


def _type(parameter: str) -> str:
    if "*" in parameter:
        return "const void*" if re.match(r"\s*const\b", parameter) else "void*"
    words = [w for w in parameter.replace("std::", "").split() if w != "const"]
    for name in (" ".join(words), " ".join(words[:-1])):  # with and without a name
        if name in _INTEGERS:
            return name
    raise ValueError(f"{parameter.strip()!r}: a launcher takes pointers and numbers ({', '.join(_INTEGERS)})")


class Launchers:
    """Launchers by name, in a shared library; those called ..._workspace return a count of bytes, all others an error code."""

    def __init__(self, sources: Sequence[Path], header: Path) -> None:
        self.declared = declarations(header)
        self.simulator = Simulator.load(compiled(sources, "checked"))

    def call(self, name: str, arguments: Sequence[Any], pointers: dict[str, int]) -> int:
        function = getattr(self.simulator.library, name)
        types = self.declared[name]
        function.argtypes = [ctypes.c_void_p if t.endswith("*") else _INTEGERS[t][1] for t in types]
        function.restype = ctypes.c_int64 if name.endswith("_workspace") else ctypes.c_int

        def number(a: Any) -> Any:
            return pointers[a.name] if isinstance(a, Array) else a

        tables = [np.array([number(e) for e in a.entries], np.int64) if isinstance(a, Table) else None for a in arguments]
        return function(*(number(a) if table is None else table.ctypes.data for a, table in zip(arguments, tables)))

    def message(self, error: int) -> str:
        function = self.simulator.library.launch_message
        function.restype = ctypes.c_char_p
        return function(error).decode()


def compiled(sources: Sequence[Path], how: str, main: str | None = None) -> Path:
    """The sources as a library, or with `main` as a program; two compilers run at a time."""
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda source: build.kernel_object(source, how), sources))
    if main is None:
        return build.link(objects, how)
    objects.append(build.kernel_object(sources[0].parent / "main.cpp", how, main))
    return build.link(objects, how, program=True)


class Program:
    """The same launchers in a program of their own, which reads one call from a file, makes it and writes the arrays back."""

    def __init__(self, sources: Sequence[Path], header: Path, sanitizer: str) -> None:
        text = "".join(_COMMENT.sub(" ", source.read_text()) for source in sources)
        declared = declarations(header)
        self.declared = {name: declared[name] for name in declared if re.search(rf"\b{name}\(", text)}  # what these define
        self.path = compiled(sources, sanitizer, _main(self.declared, header))

    def call(
        self, name: str, arguments: Sequence[Any], arrays: dict[str, np.ndarray], settings: dict[str, int], file: Path
    ) -> tuple[str, dict[str, np.ndarray]]:
        """Make one call. Returns what the sanitizer said ("" if nothing) and the arrays afterwards."""
        names = list(arrays)
        with file.open("wb") as out:
            out.write(struct.pack("<qq", list(self.declared).index(name), len(settings)))
            for key, value in settings.items():
                out.write(struct.pack("<32sq", key.encode(), value))
            out.write(struct.pack("<q", len(names)))
            for array in arrays.values():
                out.write(struct.pack("<qq", array.nbytes, array.itemsize) + array.tobytes())
            out.write(struct.pack("<q", len(arguments)))
            for argument, kind in zip(arguments, self.declared[name], strict=True):
                if isinstance(argument, Table):
                    out.write(struct.pack("<cq", b"t", len(argument.entries)))
                    for entry in argument.entries:
                        out.write(
                            struct.pack("<q?", *((names.index(entry.name), True) if isinstance(entry, Array) else (entry, False)))
                        )
                elif isinstance(argument, Array) or argument is None:
                    out.write(struct.pack("<cq", b"p", names.index(argument.name) if argument else -1))
                elif kind in ("float", "double"):
                    out.write(struct.pack("<cd", b"f", argument))
                else:
                    out.write(struct.pack("<cq", b"i", int(argument)))
        options = {"TSAN_OPTIONS": "exitcode=66", "ASAN_OPTIONS": "exitcode=66:detect_leaks=0"}
        done = subprocess.run([self.path, file], capture_output=True, text=True, env=options)
        said = done.stderr.strip() if done.returncode else ""
        if done.returncode and not said:
            said = f"the program ended with {done.returncode}"
        result, content, offset = {}, file.read_bytes(), 0
        if not done.returncode:
            for key, array in arrays.items():
                result[key] = np.frombuffer(content, array.dtype, array.size, offset).reshape(array.shape)
                offset += array.nbytes
        return said, result


def _main(declared: dict[str, list[str]], header: Path) -> str:
    """A program that makes one call; arrays lie in blocks of exactly their size, so that a sanitizer knows their ends."""
    cases = []
    for number, (name, types) in enumerate(declared.items()):
        arguments = ", ".join(
            f"Pointer{{a[{i}].p}}" if t.endswith("*") else f"({t})a[{i}].{_INTEGERS[t][0]}" for i, t in enumerate(types)
        )
        cases.append(f"        case {number}: return {name}({arguments});")
    return _PROGRAM.replace("HEADER", str(header)).replace("CASES", "\n".join(cases))


_PROGRAM = r"""
#include "launch.h"
#include "HEADER"
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <vector>

extern "C" int sim_set(const char* name, long long value);
extern "C" void sim_track(void* p, size_t bytes, int item, int writable, size_t guard, const char* name);
extern "C" const char* launch_message(int error);

struct Argument { long long i; double f; void* p; };
struct Pointer {
    void* p;
    template <class T> operator T*() const { return static_cast<T*>(p); }
};
struct Block { void* p; long long bytes; };

static int call(long long which, const Argument* a) {
    switch (which) {
CASES
    }
    return -1;
}

template <class T> static T get(FILE* file) {
    T value;
    if (fread(&value, sizeof value, 1, file) != 1) { fprintf(stderr, "the file ends too early\n"); exit(2); }
    return value;
}

int main(int, char** argv) {
    FILE* file = fopen(argv[1], "rb");
    const long long which = get<long long>(file);
    for (long long n = get<long long>(file); n; --n) {
        char name[32];
        if (fread(name, 32, 1, file) != 1) return 2;
        sim_set(name, get<long long>(file));
    }
    std::vector<Block> blocks;
    for (long long n = get<long long>(file); n; --n) {
        const long long bytes = get<long long>(file), item = get<long long>(file);
        void* p = nullptr;
        if (posix_memalign(&p, 256, bytes ? bytes : 1) || (bytes && fread(p, bytes, 1, file) != 1)) return 2;
        sim_track(p, bytes, int(item), 1, 0, "an array");
        blocks.push_back({p, bytes});
    }
    std::vector<Argument> arguments;
    std::deque<std::vector<long long>> tables;
    for (long long n = get<long long>(file); n; --n) {
        const char kind = get<char>(file);
        Argument a{};
        if (kind == 'f') a.f = get<double>(file);
        else a.i = get<long long>(file);
        if (kind == 'p') a.p = a.i < 0 ? nullptr : blocks[a.i].p;
        if (kind == 't') {
            tables.emplace_back();
            for (long long k = a.i; k; --k) {
                const long long entry = get<long long>(file);
                tables.back().push_back(get<char>(file) ? (long long)blocks[entry].p : entry);
            }
            a.p = tables.back().data();
        }
        arguments.push_back(a);
    }
    fclose(file);
    const int error = call(which, arguments.data());
    if (error) {
        fprintf(stderr, "%s\n", launch_message(error));
        return 3;
    }
    file = fopen(argv[1], "wb");
    for (const Block& b : blocks)
        if (b.bytes && fwrite(b.p, b.bytes, 1, file) != 1) return 2;
    return fclose(file) ? 2 : 0;
}
"""
