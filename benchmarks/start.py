"""First use and second start: what compiling all that the demo needs takes, and how soon there is a picture after that."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness import Bench, Row

COMPILING, STARTING = 25.0, 1.5  # seconds at most


def seconds(cache: Path, threads: int, *command: str | Path) -> float:
    """How long `tinydiff COMMAND` takes in a process of its own, with its kernels in `cache`. Raises RuntimeError if it fails."""
    environment = os.environ | {"TINYDIFF_CACHE_DIR": str(cache), "NUMBA_NUM_THREADS": str(threads)}
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "tinydiff", *command], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"tinydiff {' '.join(map(str, command))} failed: {done.stderr.strip().splitlines()[-1]}")
    return time.perf_counter() - started


def summary(case: str, took: float, most: float) -> Row:
    """A row whose target is a time, not a ratio."""
    remark = f"{took:.1f} s (at most {most:g}: {'met' if took <= most else 'not met'})"
    return {"suite": "start", "case": case, "ours_ms": 1000 * took, "most_ms": 1000 * most, "met": took <= most, "remark": remark}


def run(bench: Bench) -> None:
    """The suite. Compilation is what the same command takes longer on an empty cache; quickly, of one picture's kernels only."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def sample() -> float:
            return seconds(folder, bench.threads, "sample", "digits", "--n", "1", "--steps", "1", "--out", folder / "digit.png")

        def demo(out: str) -> float:
            return seconds(folder, bench.threads, "demo", "--steps", "2", "--out", folder / out)

        if bench.settings.quick:
            what, compiling = "a picture", sample() - sample()
        else:
            what, compiling = "the demo", demo("first") - demo("second")
            sample()
        bench.add(summary(f"compiling what {what} needs", compiling, COMPILING))
        bench.add(summary("one picture, compiled before", statistics.median(sample() for _ in range(3)), STARTING))
