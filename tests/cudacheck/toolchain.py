"""NVIDIA's compiler from the packages of the extra `cuda-build`, and what it makes of a source.

Not the nvcc that happens to be on the PATH: every version allots registers a little differently, and a stored table should
hold on every machine.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tinydiff.cudasim.build import cache_folder, csrc, digest

FLAGS = ("-std=c++17", "-O3", "-Xptxas=-v", "-cubin")  # the code that setup.py builds, whose -lineinfo changes none of it
_INCLUDE = re.compile(r'#include "([^"]+)"')
_RESOURCES = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers([^\n]*)",
    re.DOTALL,
)


class Missing(RuntimeError):
    """A tool is not here; the message says how to get it."""


@dataclass(frozen=True)
class Resources:
    """What one kernel takes, in bytes but for registers and threads (the most a block may have; 0 if it is not declared)."""

    registers: int
    spills: int
    local: int
    shared: int
    threads: int


@dataclass(frozen=True)
class Compiled:
    """A source for one architecture: resources of its kernels by symbol, and where the machine code lies."""

    resources: dict[str, Resources]
    cubin: Path


@cache
def tool(name: str) -> str:
    """The path of the packages' nvcc or nvdisasm. Raises Missing."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for path in Path(folder).glob(f"cu*/bin/{name}"):
            return str(path)
    raise Missing(f"the package nvidia-cuda-{name} is not installed: pip install '.[cuda-build]'")


@cache
def version() -> str:
    """nvcc's, such as "13.0.88"."""
    said = subprocess.run([tool("nvcc"), "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"V([\d.]+)", said)[1]  # type: ignore[index]


def _texts(source: Path) -> Iterator[str]:
    seen: set[Path] = set()
    waiting = [source]
    while waiting:
        path = waiting.pop()
        if path not in seen and path.exists():
            seen.add(path)
            text = path.read_text()
            yield text
            waiting += [csrc() / name for name in _INCLUDE.findall(text) if not name.startswith("sim/")]


def compile_for(source: Path, sm: str) -> Compiled:
    """Compile one source for sm "80", say; what has not changed is not compiled again. Raises RuntimeError with nvcc's words."""
    flags = (*FLAGS, f"-arch=sm_{sm}", f"-I{csrc()}")
    key = digest(version(), *FLAGS, *sorted(_texts(source)))
    cubin = cache_folder() / f"{source.stem}-sm_{sm}-{key}.cubin"
    log, ptx = cubin.with_suffix(".log"), cubin.with_suffix(".ptx")
    if not cubin.exists():
        with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
            made = Path(folder) / cubin.name
            command = [tool("nvcc"), *flags, "--keep", f"--keep-dir={folder}", "-o", str(made), str(source)]
            environment = {name: value for name, value in os.environ.items() if not name.startswith("NVCC_")}  # more flags
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"nvcc refuses {source.name} for sm_{sm}:\n{done.stderr.strip()}")
            log.write_text(done.stderr)
            (Path(folder) / f"{source.stem}.ptx").replace(ptx)
            made.replace(cubin)
    return Compiled(resources(log.read_text(), ptx.read_text()), cubin)


def disassemble(cubin: Path) -> str:
    """The machine code as text."""
    return subprocess.run([tool("nvdisasm"), "-c", str(cubin)], capture_output=True, text=True, check=True).stdout


def resources(log: str, ptx: str) -> dict[str, Resources]:
    """Of each kernel by symbol: what ptxas -v says, and from the PTX the bounds of the block and the shared buffer's size."""
    declared = {}
    for part in ptx.split(".entry ")[1:]:
        symbol = re.match(r"\w+", part)[0]  # type: ignore[index]
        threads, shared = re.search(r"\.maxntid (\d+)", part), re.search(r"// shared bytes: (\d+)", part)
        declared[symbol] = (int(threads[1]) if threads else 0, int(shared[1]) if shared else 0)
    found = {}
    for symbol, local, stores, loads, registers, rest in _RESOURCES.findall(log):
        static = re.search(r"(\d+) bytes smem", rest)
        threads, dynamic = declared[symbol]
        shared = dynamic + (int(static[1]) if static else 0)
        found[symbol] = Resources(int(registers), int(stores) + int(loads), int(local), shared, threads)
    if missing := declared.keys() - found:
        raise RuntimeError(f"ptxas said nothing of {', '.join(sorted(missing))}")
    return found
