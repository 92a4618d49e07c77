"""What this machine computes with, what is missing, and the fix."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Finding:
    """One line. `status`: "ok", "missing" (something optional) or "warning" (slower or less than it could be)."""

    what: str
    found: str
    status: str = "ok"
    fix: str = ""


OPTIONAL = {
    "hypothesis": ("property tests of ops (tinydiff.testing)", "pip install 'tinydiff[test]'"),
    "pytest": ("the tests", "pip install 'tinydiff[test]'"),
    "torch": ("the opponent in benchmarks and an oracle in tests, nothing else", "pip install 'tinydiff[torch]'"),
}
_ASK_BLAS = (
    "import json, numpy, threadpoolctl; "
    "print(json.dumps([i for i in threadpoolctl.threadpool_info() if i['user_api'] == 'blas']))"
)


def examine() -> Iterator[Finding]:
    """Look at everything in turn."""
    from tinydiff import __version__

    yield Finding("tinydiff", f"{__version__} on Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    yield Finding("device cpu", f"{platform.processor() or platform.machine()}, {_processors()} processors for this process")
    yield from _cuda()
    yield from _blas()
    yield from _numba()
    yield from _cache()
    yield from _shipped()
    for package, (purpose, install) in OPTIONAL.items():
        version = _version(package)
        yield Finding(package, version or f"missing: {purpose}", "ok" if version else "missing", "" if version else install)
    dot = shutil.which("dot")
    fix = "install Graphviz (apt install graphviz, brew install graphviz)"
    yield Finding("dot", dot or "missing: draws graphs as SVG", "ok" if dot else "missing", "" if dot else fix)


def _cuda() -> Iterator[Finding]:
    """The GPU and its simulator: arrays, then the kernels that setup.py built for each."""
    from tinydiff import backend
    from tinydiff.kernels import cuda

    try:
        backend.check_device("cuda")
        gpu = backend.module_of("cuda").cuda.runtime.getDeviceProperties(0)["name"].decode()
        yield Finding("device cuda", f"{gpu}, CuPy {_version('cupy-cuda13x') or 'of another build'}")
    except RuntimeError as error:
        what, _, fix = str(error).partition(": ")
        yield Finding("device cuda", what, "missing", fix)
    yield Finding("device cudasim", "a GPU's rules with NumPy's arithmetic")
    note = Path(__file__).parent / "build.json"
    record = json.loads(note.read_text()) if note.is_file() else {}
    for device, name, compiler in (("cuda", "_cuda", "the CUDA toolkit (nvcc)"), ("cudasim", "_cudasim", "g++")):
        built = record.get(f"tinydiff.{name}", {"built": False, "why": "this copy was not installed by pip"})
        fix = f"with {compiler} on the PATH: pip install --force-reinstall --no-deps ."
        if cuda.extension(device) is not None:
            yield Finding(f"kernels {device}", f"built by {built['by']}" if built["built"] else "built")
        elif built["built"]:
            yield Finding(f"kernels {device}", f"built by {built['by']}, but not importable here", "warning", fix)
        else:
            yield Finding(f"kernels {device}", f"not built ({built['why']}), so definitions run", "missing", fix)


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _blas() -> Iterator[Finding]:
    import numpy as np
    import threadpoolctl

    pools = [pool for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]
    if not pools:
        yield Finding(
            "BLAS", f"NumPy {np.__version__} with one that is not known here", "warning", "pip install numpy (OpenBLAS)"
        )
    for pool in pools:
        kernel = pool.get("architecture") or "unknown"
        found = (
            f"NumPy {np.__version__}, {pool['internal_api']} {pool['version']}, kernel {kernel}, {pool['num_threads']} threads"
        )
        best = _kernel_unforced() if os.environ.get("OPENBLAS_CORETYPE") else kernel
        if best != kernel:
            yield Finding("BLAS", found, "warning", f"OPENBLAS_CORETYPE forces this kernel; unset it to get {best}")
        else:
            yield Finding("BLAS", found)


def _kernel_unforced() -> str:
    """The kernel that BLAS would choose by itself, asked of a fresh process."""
    environment = {name: value for name, value in os.environ.items() if name != "OPENBLAS_CORETYPE"}
    asked = subprocess.run([sys.executable, "-c", _ASK_BLAS], env=environment, capture_output=True, text=True, check=False)
    try:
        return json.loads(asked.stdout)[0]["architecture"]
    except (ValueError, LookupError):
        return "unknown"


def _numba() -> Iterator[Finding]:
    import numba

    from tinydiff.kernels import jit  # noqa: F401 (starts the pool; and keeps BLAS to one thread, so not before `_blas`)

    config: Any = numba.config
    threads = numba.get_num_threads()
    found = f"{numba.__version__}, {threads} threads, threading layer {numba.threading_layer()}"
    if config.DISABLE_JIT:
        yield Finding("Numba", found, "warning", "NUMBA_DISABLE_JIT is set, so kernels run as Python; unset it")
    elif threads < _processors():
        yield Finding("Numba", found, "warning", f"unset NUMBA_NUM_THREADS to use all {_processors()} processors")
    else:
        yield Finding("Numba", found)


def _cache() -> Iterator[Finding]:
    import numba

    from tinydiff.kernels import jit  # noqa: F401 (chooses the folder)

    config: Any = numba.config
    folder = Path(config.CACHE_DIR)
    files = list(folder.rglob("*.nbc"))
    found = f"{folder}: {len(files)} compiled kernels, {sum(f.stat().st_size for f in files) / 2**20:.1f} MiB"
    if "tinydiff-kernels-" in folder.name:
        yield Finding(
            "kernel cache", found, "warning", "temporary, so each run compiles anew: set TINYDIFF_CACHE_DIR to a folder"
        )
    elif not files:
        yield Finding("kernel cache", found, "ok", "the first run fills it")
    else:
        yield Finding("kernel cache", found)


def _shipped() -> Iterator[Finding]:
    from tinydiff.pipeline import load_model, weights_hash

    for name in ("digits", "classifier"):
        try:
            model, _ = load_model(name)
            yield Finding(f"model {name}", f"weights {weights_hash(model)}, {model.num_parameters():,} parameters")
        except (ValueError, OSError) as error:
            yield Finding(f"model {name}", str(error), "missing", "install the package again, or train one with `tinydiff train`")
