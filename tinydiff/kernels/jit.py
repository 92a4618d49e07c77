"""How the CPU kernels are compiled: `njit` with one set of flags, an on-disk cache of our own, and a notice on first use.

The cache folder is keyed by a hash of this package's sources: Numba's own check looks only at the file that defines the kernel,
so a kernel that inlines a helper from another file would go stale. TINYDIFF_CACHE_DIR moves the cache; where it can't be
written, kernels are compiled anew in a temporary folder and everything else works as before.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import hashlib
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numba
import platformdirs
import threadpoolctl
from llvmlite import binding
from numba.core import event

# Contraction to FMA and reordering of sums, but NaN, infinities and the sign of zero stay what IEEE says.
FASTMATH = {"contract", "reassoc", "arcp"}


def cache_folder() -> Path:
    """The folder that compiled kernels are kept in, made if it can be, else a temporary one that goes with the process."""
    digest = hashlib.sha256(numba.__version__.encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    root = os.environ.get("TINYDIFF_CACHE_DIR") or platformdirs.user_cache_dir("tinydiff")
    folder = Path(root) / f"kernels-{digest.hexdigest()[:16]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="tinydiff-kernels-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return folder


class _Notice(event.Listener):
    """Says once that kernels are being compiled, so that the first run's wait has a reason."""

    said = False

    def on_start(self, event: Any) -> None:
        if not self.said and os.environ.get("TINYDIFF_QUIET") is None:
            print("tinydiff: compiling kernels (first run only) …", file=sys.stderr, flush=True)
        _Notice.said = True

    def on_end(self, event: Any) -> None:
        pass


def _start_pool() -> None:
    """Start the thread pool with threads that go to sleep when they have waited some 0.3 ms for work.

    GNU OpenMP's threads spin for many milliseconds instead. Alone on the machine that is as good, but where another
    process wants a core, each barrier then waits for a whole time slice: a training step took 20 to 30 times as long. The
    variable is read when the library is loaded; it is set for just that moment, and never over the user's own choice.
    """
    from numba.np.ufunc import parallel

    chosen = any(name in os.environ for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"))
    if not chosen:
        os.environ["GOMP_SPINCOUNT"] = "8000"
    try:
        parallel._launch_threads()
    finally:
        if not chosen:
            del os.environ["GOMP_SPINCOUNT"]
    # Numba lets parallel regions nest, in a library that others share: PyTorch's attention calls small products from within a
    # parallel region, each then started threads of its own, and a training step there took 2.8 times as long.
    for library in threadpoolctl.threadpool_info():
        if library["user_api"] == "openmp":
            ctypes.CDLL(library["filepath"]).omp_set_max_active_levels(1)
    # And no second pool: the threads of NumPy's BLAS spin for 30 ms after each call, and the small products of a step were
    # enough to slow all kernels between them down, a step of the base preset 2.5 times. Large products have a kernel.
    threadpoolctl.threadpool_limits(1, user_api="blas")


def _prefer_wide_vectors() -> None:
    """On processors with AVX-512, let LLVM use its full width: loops over arrays ran about 1.3 times as fast."""
    features = binding.get_host_cpu_features()
    if features.get("avx512f") and numba.config.CPU_FEATURES is None:
        numba.config.CPU_FEATURES = features.flatten() + ",-prefer-256-bit"


def _keep_freed_memory() -> None:
    """Let glibc keep freed blocks of up to 1 GiB instead of returning them to the system at once.

    A training step frees and takes the same blocks again and again; each time they came back as fresh pages to be zeroed,
    16,000 page faults a step of the small UNet and some 10 % of its time. With 32 MiB as the bound the largest blocks of a
    batch of 128 still did, which took 3 to 6 % of a step; the peak of memory is the same.
    """
    mmap_threshold, trim_threshold = -3, -1
    if any(name.startswith("MALLOC_") for name in os.environ):
        return  # the user's own choice
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return  # another C library
    mallopt(mmap_threshold, 1 << 30)
    mallopt(trim_threshold, 2**31 - 1)


# Numba brings half a million objects that live as long as the process. Keep the garbage collector from walking through them
# each time the tape grows: that took two thirds of a tiny op's time.
gc.freeze()
# A graph is thousands of small objects that die by reference count; to look for cycles among each 700 of them took a tenth of
# the tape's time.
if 0 < gc.get_threshold()[0] < 10_000:
    gc.set_threshold(10_000, *gc.get_threshold()[1:])
numba.config.CACHE_DIR = str(cache_folder())
_keep_freed_memory()
_prefer_wide_vectors()
event.register("numba:run_pass", _Notice())  # not "numba:compile", which the cache's hits announce too
_start_pool()


def njit(*args: Any, **options: Any) -> Any:
    """`numba.njit` with the package's defaults (cached on disk, `FASTMATH`, no bounds checks, division as in C)."""
    settings = {"cache": True, "fastmath": FASTMATH, "error_model": "numpy", "nogil": True} | options
    return numba.njit(*args, **settings)
