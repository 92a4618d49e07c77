"""Builds the CUDA kernels where there is a compiler for them: `_cuda` with nvcc for GPUs, `_cudasim` with g++ for the simulator.

Neither missing is an error: all else is Python, compiled by Numba on first use. What was built, and why not, is written to
tinydiff/build.json, which `tinydiff doctor` shows. From the environment:

    TINYDIFF_CUDA       auto (default), 0 (build no _cuda) or 1 (fail without it)
    TINYDIFF_CUDA_ARCH  80, or 80,90, or all; by default that of the GPU found here, else 80. PTX for later ones is always added
    CXX, NVCC           the compilers

Objects are kept in build/ and made again only when their source, or what it includes, has changed.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

CSRC = Path("csrc")
ARCHITECTURES = ["75", "80", "86", "89", "90", "100", "120"]
COMMON = ["-std=c++17", "-fPIC", "-fvisibility=hidden"]
MEMORY_PER_JOB = 1 << 30  # bytes that one compiler may need


class CannotBuild(Exception):
    """Why an extension is left out, in one line."""


def find(variable: str, default: str, purpose: str) -> str:
    """The path of a compiler. Raises CannotBuild when there is none."""
    name = os.environ.get(variable) or default
    path = shutil.which(name)
    if path is None:
        raise CannotBuild(f"{name} is not on the PATH, and {purpose}")
    return path


def architectures() -> list[str]:
    """Compute capabilities to build for, such as "80". Raises SystemExit for a wish that names none."""
    asked = os.environ.get("TINYDIFF_CUDA_ARCH")
    if asked:
        if asked != "all" and not re.fullmatch(r"\d+(,\d+)*", asked):
            raise SystemExit(f"TINYDIFF_CUDA_ARCH={asked}: use 80, or 80,90, or all")
        return ARCHITECTURES if asked == "all" else asked.split(",")
    tool = shutil.which("nvidia-smi")
    if tool is not None:
        query = [tool, "--query-gpu=compute_cap", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, check=False).stdout
        if capabilities := re.findall(r"(\d+)\.(\d)", found):
            return ["".join(capabilities[0])]
    return ["80"]


def run(command: list[str]) -> None:
    """Run a compiler. Raises CannotBuild with the first error it prints."""
    print(" ".join(command), flush=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr)
        errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["no message"]
        raise CannotBuild(f"{Path(command[0]).name} failed: {errors[0].strip()}")


def included(source: Path) -> dict[Path, bytes]:
    """A source and all of ours that it includes, with their contents."""
    found: dict[Path, bytes] = {}
    waiting = [source]
    while waiting:
        path = waiting.pop()
        if path not in found and path.is_file():
            found[path] = path.read_bytes()
            waiting += [path.parent / name for name in re.findall(r'#include "([^"]+)"', found[path].decode())]
            waiting += [CSRC / name for name in re.findall(r'#include "([^"]+)"', found[path].decode())]
    return found


def workers() -> int:
    """How many compilers run at once."""
    memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(len(os.sched_getaffinity(0)), memory // MEMORY_PER_JOB))


def compile_all(jobs: list[tuple[list[str], Path]], folder: Path) -> list[str]:
    """Compile each (command, source) whose object isn't there yet, as many at once as processors and memory allow."""
    folder.mkdir(parents=True, exist_ok=True)

    def compile_one(job: tuple[list[str], Path]) -> str:
        command, source = job
        digest = hashlib.sha256(" ".join(command).encode())
        for path, content in sorted(included(source).items()):
            digest.update(str(path).encode() + b"\0" + content)
        target = folder / f"{source.stem}-{digest.hexdigest()[:16]}.o"
        if not target.exists():
            partial = target.with_suffix(".partial.o")
            run([*command, "-c", str(source), "-o", str(partial)])
            partial.replace(target)
        return str(target)

    with ThreadPoolExecutor(workers()) as pool:
        return list(pool.map(compile_one, jobs))


def bindings(compiler: str, module: str) -> tuple[list[str], Path]:
    """How the Python side of an extension is compiled."""
    import pybind11  # needed only here, so that installing without a compiler asks for nothing

    include = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    return [compiler, *COMMON, "-O2", f"-DMODULE={module}", *include], CSRC / "bindings.cpp"


def build_cudasim(target: Path, folder: Path) -> str:
    """Kernels and the simulator with g++. Returns what built them."""
    compiler = find("CXX", "g++", "the simulated GPU's kernels are compiled with it")
    flags = [compiler, *COMMON, "-O2", "-g1", "-gdwarf-4", "-fno-strict-aliasing", "-DTINYDIFF_SIM"]
    kernels = [([*flags, "-x", "c++"], source) for source in sorted(CSRC.glob("*.cu"))]
    jobs = [*kernels, (flags, CSRC / "sim" / "runtime.cpp"), bindings(compiler, "_cudasim")]
    run([compiler, "-shared", *compile_all(jobs, folder), "-ldl", "-o", str(target)])
    return compiler


def build_cuda(target: Path, folder: Path) -> str:
    """Kernels with nvcc, their binding with g++. Returns what built them."""
    wish = os.environ.get("TINYDIFF_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        raise SystemExit(f"TINYDIFF_CUDA={wish}: use auto, 0 or 1")
    if wish == "0":
        raise CannotBuild("TINYDIFF_CUDA=0 asks for none")
    try:
        nvcc = find("NVCC", "nvcc", "kernels for GPUs are compiled with it (install the CUDA toolkit)")
        compiler = find("CXX", "g++", "nvcc needs it")
        chosen = architectures()
        codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in chosen]
        codes.append(f"-gencode=arch=compute_{chosen[-1]},code=compute_{chosen[-1]}")
        flags = [nvcc, "-std=c++17", "-O3", "-lineinfo", "-Xcompiler=-fPIC,-fvisibility=hidden", f"-ccbin={compiler}", *codes]
        jobs = [*[(flags, source) for source in sorted(CSRC.glob("*.cu"))], bindings(compiler, "_cuda")]
        run([nvcc, "-shared", f"-ccbin={compiler}", "-cudart=static", *compile_all(jobs, folder), "-o", str(target)])
    except CannotBuild as reason:
        if wish == "1":
            raise SystemExit(f"TINYDIFF_CUDA=1, but {reason}") from None
        raise
    return f"{nvcc} for sm_{', sm_'.join(chosen)} and PTX"


class BuildKernels(build_ext):
    """Both extensions, or what can be built of them, and the record of it."""

    builders = {"tinydiff._cudasim": build_cudasim, "tinydiff._cuda": build_cuda}  # noqa: RUF012
    built: tuple[str, ...] = ()

    def run(self) -> None:
        record = {}
        for name, builder in self.builders.items():
            target = Path(self.get_ext_fullpath(name))
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            try:
                made = builder(target, Path(self.build_temp) / name)
                self.built += (str(target),)
                record[name] = {"built": True, "by": made}
            except CannotBuild as reason:
                record[name] = {"built": False, "why": str(reason)}
            print(f"{name}: {record[name]}", flush=True)
        note = Path(self.get_ext_fullpath("tinydiff._cuda")).parent / "build.json"
        note.write_text(json.dumps(record, indent=2) + "\n")
        self.built += (str(note),)

    def get_outputs(self) -> list[str]:
        return list(self.built)

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class BuildPython(build_py):
    """The package, with the CUDA sources inside it: people compile kernels of their own against them."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            shutil.copytree(CSRC, Path(self.build_lib) / "tinydiff" / "csrc", dirs_exist_ok=True)


if __name__ == "__main__":
    setup(
        ext_modules=[Extension(name, []) for name in BuildKernels.builders],
        cmdclass={"build_ext": BuildKernels, "build_py": BuildPython},
    )
