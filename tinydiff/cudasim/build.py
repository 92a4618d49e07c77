"""Compiling CUDA sources against the simulator with g++, cached by content.

Four builds of one source: `fast` (calls of the launch header are checked), `checked` (every access of a kernel is checked,
races are found), and the stand-alone programs `tsan` and `asan`, which a sanitizer of the compiler's own watches.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import platformdirs

COMMON = ["-std=c++17", "-fPIC", "-DTINYDIFF_SIM", "-fno-strict-aliasing", "-g1", "-gdwarf-4", "-Wall", "-Wno-unused"]
"""Of DWARF 4, because addr2line confuses the first two files of version 5: findings would name the wrong one."""
RUNTIME = {
    "fast": ["-O2", "-fvisibility=hidden"],  # each library has a simulator of its own
    "checked": ["-O2", "-fvisibility=hidden"],
    "tsan": ["-O2", "-DTINYDIFF_SIM_TSAN"],
    "asan": ["-O1", "-DTINYDIFF_SIM_ASAN"],
}
KERNELS = {
    "fast": ["-O2"],
    "checked": ["-O1", "-fsanitize=thread"],
    "tsan": ["-O1", "-fsanitize=thread", "-DTINYDIFF_SIM_TSAN"],
    "asan": ["-O1", "-fsanitize=address", "-DTINYDIFF_SIM_ASAN"],
}
LINK = {"fast": [], "checked": [], "tsan": ["-fsanitize=thread"], "asan": ["-fsanitize=address"]}


class CompileError(RuntimeError):
    """g++ refused a source; the message holds what it said."""


def csrc() -> Path:
    """The folder of the CUDA sources: inside an installed package, beside it in a checkout."""
    package = Path(__file__).parent.parent
    for folder in (package / "csrc", package.parent / "csrc"):
        if (folder / "launch.h").exists():
            return folder
    raise RuntimeError(f"the CUDA sources (csrc/launch.h) lie neither in {package} nor beside it: install tinydiff again")


def compiler() -> str:
    """The path of g++ (or of the GNU compiler that the environment variable CXX names)."""
    name = os.environ.get("CXX") or "g++"
    found = shutil.which(name)
    if found is None:
        raise RuntimeError(f"the CUDA simulator compiles with {name}, which is not on the PATH: install it (apt install g++)")
    return found


def cache_folder() -> Path:
    """Where builds are kept: TINYDIFF_CACHE_DIR, else the user's cache."""
    folder = Path(os.environ.get("TINYDIFF_CACHE_DIR") or platformdirs.user_cache_dir("tinydiff")) / "cudasim"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def digest(*parts: str | bytes) -> str:
    """A name for what these texts say."""
    total = hashlib.sha256()
    for part in parts:
        total.update(part.encode() if isinstance(part, str) else part)
        total.update(b"\0")
    return total.hexdigest()[:20]


def _headers() -> bytes:
    return b"".join(path.read_bytes() for path in sorted(csrc().rglob("*.h")))


def _run(command: Sequence[str | Path], output: Path) -> Path:
    """Run one command that writes `output`, which appears whole or not at all."""
    with tempfile.NamedTemporaryFile(dir=output.parent, prefix=output.name, suffix=output.suffix, delete=False) as file:
        partial = Path(file.name)
    try:
        done = subprocess.run([*map(str, command), "-o", str(partial)], capture_output=True, text=True)
        if done.returncode:
            raise CompileError(f"g++ refuses the source:\n{done.stderr.strip()}")
        os.replace(partial, output)
    finally:
        partial.unlink(missing_ok=True)
    return output


def runtime_object(build: str) -> Path:
    """The compiled simulator of a build."""
    folder = csrc() / "sim"
    text = b"".join(path.read_bytes() for path in sorted(folder.iterdir()))
    flags = [*COMMON, *RUNTIME[build]]
    output = cache_folder() / f"runtime-{build}-{digest(compiler(), *flags, text)}.o"
    if output.exists():
        return output
    return _run([compiler(), *flags, "-c", folder / "runtime.cpp"], output)


def kernel_object(source: Path, build: str, text: str | None = None) -> Path:
    """One compiled source. `text` is compiled in its place, as if it lay where `source` does."""
    content = source.read_text() if text is None else text
    include = [f"-I{csrc()}", f"-I{source.parent}"]
    flags = [*COMMON, *KERNELS[build], *include]
    output = cache_folder() / f"{source.stem}-{build}-{digest(compiler(), *flags, _headers(), str(source), content)}.o"
    if output.exists():
        return output
    if text is None:
        return _run([compiler(), *flags, "-x", "c++", "-c", source], output)
    wrapped = output.with_suffix(".cpp")
    wrapped.write_text(text)
    return _run([compiler(), *flags, "-c", wrapped], output)


def link(objects: Sequence[Path], build: str, *, program: bool = False) -> Path:
    """A shared library of the objects and the simulator, or a program."""
    inputs = [*objects, runtime_object(build)]
    suffix = "" if program else ".so"
    output = cache_folder() / f"{objects[0].stem}-{digest(*map(str, inputs))}{suffix}"
    if output.exists():
        return output
    shape = [] if program else ["-shared"]
    _run([compiler(), *shape, *inputs, *LINK[build], "-ldl"], output)
    output.chmod(0o755)
    return output
