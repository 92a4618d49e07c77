"""The harness: both sides are checked to compute the same, then timed in turn, and every result is one kind of row.

Absolute times on a shared machine lie, so ours and theirs run alternately (ours, theirs, ours, theirs, …) and medians are
compared; where calls are short, each measurement is the best of several. Between measurements the process rests for a moment:
the idle threads of one side's pool spin for a while after a call, and would otherwise take the cores from the other side.
"""

from __future__ import annotations

import gc
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import threadpoolctl
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks import gpu
from tinydiff import backend

Row = dict[str, Any]
Arrays = Sequence[np.ndarray]
REST = 0.005  # seconds between measurements
UNSTEADY = 1.5  # a median over its minimum that is worth a remark
SHORT = 0.04  # a measurement is the best of the calls that fill this many seconds
GRAIN = 1e-4  # calls shorter than this are timed in groups


@dataclass
class Side:
    """One contender: what is timed, and how its result becomes NumPy arrays (channels last) for the comparison."""

    run: Callable[[], Any]
    arrays: Callable[[Any], Arrays] = lambda result: [np.asarray(result)]


@dataclass
class Case:
    """One row to be: ours against theirs, doing the same work.

    Attributes:
        theirs: variants of the opponent by name ("contiguous", "channels_last"); the fastest counts. Empty without one.
        target: ratio (their time over ours) to reach, or None.
        flops, bytes: work and least memory traffic of one run.
        counted: whether those of the two that are None are counted: what the ops of one more run of ours declare, read and write.
        tolerance: greatest allowed difference of any element, relative to the largest element of that array.
        reference: the same work done elsewhere, which is compared but not timed; for what runs on a GPU, it on the CPU.
        extra: more entries for the row.
    """

    suite: str
    name: str
    ours: Side
    theirs: dict[str, Side] = field(default_factory=dict)
    target: float | None = None
    flops: float | None = None
    bytes: float | None = None
    counted: bool = False
    tolerance: float = 1e-4
    reference: Side | None = None
    extra: Row = field(default_factory=dict)


@dataclass
class Settings:
    """How to run: threads for both sides, measurements per contender, whether to cut work short, and where ours computes.

    `card` is the GPU whose roofline stands where `device` can't be measured (`benchmarks.gpu.CARDS`).
    """

    against: str | None = None
    threads: int | None = None
    repeat: int = 9
    quick: bool = False
    seconds: float = 20.0  # no contender of a case is measured again once the case took this long
    device: str = "cpu"
    card: str = "a100"


class Bench:
    """Runs cases and collects rows. Measures the sgemm and copy rates of this very run for comparison.

    Attributes:
        unmeasured: why nothing can be timed on the device of the settings; None if it can.
    """

    def __init__(self, settings: Settings, console: Console | None = None) -> None:
        import tinydiff

        self.settings = settings
        self.console = console or Console(stderr=True)
        self.rows: list[Row] = []
        self.torch: Any = None
        if settings.against == "torch":
            self.torch = import_torch()
            gc.collect()
            gc.freeze()  # what PyTorch's import left is not to be walked through on account of our objects
        self._share_threads(settings.threads or tinydiff.get_num_threads())
        for warning in blas_warnings() + load_warnings():
            self.console.print(f"warning: {warning}")
        self.unmeasured = None if settings.device == "cpu" else gpu.missing(settings.device)
        self.sgemm = self.copy = math.nan
        if settings.device != "cpu":
            if self.unmeasured is None:
                xp = backend.module_of(settings.device)
                rates = gpu.rates(gpu.Stopwatch(xp), xp, size=2048 if settings.quick else 8192)
                self.sgemm, self.copy = rates.matrix["float32"], rates.copy
            return
        self._measure_limits()

    def _share_threads(self, threads: int) -> None:
        """Give each side this many."""
        import tinydiff

        tinydiff.set_num_threads(threads)
        if self.torch:
            self.torch.set_num_threads(threads)
        self.threads = threads

    def _measure_limits(self) -> None:
        # OpenMP's default is to leave BLAS its own number of threads; both sides get the same.
        with threadpoolctl.threadpool_limits(self.threads, user_api="blas"):
            self.sgemm = sgemm_rate(1024 if self.settings.quick else 2048)
            self.copy = copy_rate(self.threads, 2**22 if self.settings.quick else 2**25)

    @contextmanager
    def on_threads(self, threads: int) -> Iterator[None]:
        """A block in which both sides have this many threads, and shares are of what as many threads multiply and copy."""
        before = self.threads, self.sgemm, self.copy
        try:
            self._share_threads(threads)
            self._measure_limits()
            yield
        finally:
            self._share_threads(before[0])
            self.sgemm, self.copy = before[1:]

    def run(self, case: Case) -> Row:
        """Check, measure, record and return the row of one case."""
        row: Row = {"suite": case.suite, "case": case.name, "ours_ms": None, "theirs_ms": None, "ratio": None}
        row |= {"target": case.target, "met": None, "wrong": None, "variant": None, "threads": self.threads}
        row |= {"device": self.settings.device, "kind": "measured"}
        if self.unmeasured:
            simulated = self.settings.device == "cudasim"
            row["kind"] = "simulated" if simulated else "not measured"
            row |= {"wrong": self.check(case) if simulated else None, "remark": self._model(case)}
            return self.add(row | case.extra)
        row["wrong"] = self.check(case)
        if row["wrong"] is None:
            contenders = {"ours": case.ours, **case.theirs}
            times = measure({name: side.run for name, side in contenders.items()}, self.settings)
            medians = {name: statistics.median(values) for name, values in times.items()}
            row["ours_ms"] = 1000 * medians.pop("ours")
            if medians:
                row["variant"] = min(medians, key=lambda name: medians[name])
                row["theirs_ms"] = 1000 * medians[row["variant"]]
                row["ratio"] = row["theirs_ms"] / row["ours_ms"]
            # Far from the best of its own measurements, a median says more about the machine's other work than about the code.
            unsteady = {name: statistics.median(v) / min(v) for name, v in times.items() if name in ("ours", row["variant"])}
            row["unsteady"] = max(unsteady.values())
            self._rates(row, case)
        if case.target is not None and (row["wrong"] or row["ratio"] is not None):
            row["met"] = row["wrong"] is None and row["ratio"] >= case.target
        return self.add(row | case.extra)

    def add(self, row: Row) -> Row:
        """Record a row made elsewhere (a summary, or one measured in another process)."""
        empty = dict.fromkeys(("ours_ms", "theirs_ms", "ratio", "target", "met", "wrong", "variant"))
        self.rows.append({**empty, "threads": self.threads, **row})
        self.console.print(f"[dim]{row['suite']}: {row['case']}  {_ratio(row)}[/dim]", highlight=False)
        return self.rows[-1]

    def mean(self, suite: str, name: str, rows: Iterable[Row], target: float | None = None) -> None:
        """Record the geometric mean of the rows' ratios, as a row of its own. A wrong row makes it a failure."""
        rows = list(rows)
        ratios = [row["ratio"] for row in rows if row["ratio"] is not None]
        if ratios:
            mean = math.exp(statistics.fmean(math.log(r) for r in ratios))
            wrong = "one of its rows is wrong" if any(row["wrong"] for row in rows) else None
            met = None if target is None else mean >= target and not wrong
            self.add({"suite": suite, "case": name, "ratio": mean, "target": target, "met": met, "wrong": wrong})

    def check(self, case: Case) -> str | None:
        """What is wrong with our result beside theirs; None if nothing is."""
        ours = list(case.ours.arrays(case.ours.run()))
        if not case.theirs and not all(np.isfinite(a).all() for a in ours):
            return "not finite"
        for name, side in (case.theirs | ({"on the CPU": case.reference} if case.reference else {})).items():
            wrong = difference(ours, side.arrays(side.run()), case.tolerance)
            if wrong:
                return f"{wrong} ({name})"
        return None

    def _model(self, case: Case) -> str:
        """What stands in the place of a time: where there is none, the least that a card's published rate allows."""
        if self.settings.device == "cudasim":
            return "simulated: checked, not timed"
        card = gpu.CARDS[self.settings.card]
        least = gpu.roofline(card, "float32", case.flops or 0.0, case.bytes or 0.0)
        return f"not measured; model: {1000 * least.seconds:.3g} ms or more on a {card.name}, by its data sheet" if least else ""

    def _rates(self, row: Row, case: Case) -> None:
        seconds = row["ours_ms"] / 1000
        found = count_work(case.ours.run) if case.counted else (None, None)
        flops, bytes_ = case.flops or found[0], case.bytes or found[1]
        if flops:
            row["gflops"] = flops / seconds / 1e9
            row["share_of_sgemm"] = row["gflops"] / self.sgemm
        if bytes_:
            row["gbs"] = bytes_ / seconds / 1e9
            row["share_of_copy"] = row["gbs"] / self.copy


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy that begins on a cache line, as results of ops do on both sides; where NumPy's begin is chance."""
    from tinydiff.kernels.memory import empty

    made = empty(*array.shape)
    made[...] = array
    return made


def count_work(run: Callable[[], Any]) -> tuple[float, float]:
    """Floating-point operations of our ops in a call, and bytes that they read and write; the optimiser is none of them."""
    from tinydiff.hooks import profile

    with profile() as found:
        run()
    return sum(row.flops for row in found.rows), sum(row.bytes for row in found.rows)


def difference(ours: Arrays, theirs: Arrays, tolerance: float) -> str | None:
    """How two results differ by more than `tolerance` of each array's largest element; None if they don't."""
    if [a.shape for a in ours] != [b.shape for b in theirs]:
        return f"shapes {[a.shape for a in ours]} against {[b.shape for b in theirs]}"
    for a, b in zip(ours, theirs):
        worst = float(np.max(np.abs(a - b), initial=0.0)) / max(float(np.max(np.abs(b), initial=0.0)), 1e-30)
        if not worst <= tolerance:  # NaN is not, either
            return f"differs by {worst:.1e} of the largest, more than {tolerance:.0e}"
    return None


def import_torch() -> Any:
    """PyTorch. Raises RuntimeError saying how to get it when it isn't there."""
    try:
        import torch
    except ImportError:
        raise RuntimeError("--against torch needs PyTorch, which is an extra: pip install torch") from None
    return torch


def measure(contenders: dict[str, Callable[[], Any]], settings: Settings) -> dict[str, list[float]]:
    """Seconds per call of each contender, several times, run in turn after a warm-up (two calls, where calls are short)."""
    expected = {}
    for name, run in contenders.items():
        expected[name] = _seconds(run)
        if expected[name] < 0.5:
            expected[name] = _seconds(run)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    started = time.perf_counter()
    for turn in range(3 if settings.quick else settings.repeat):
        for name, run in contenders.items():
            time.sleep(REST)
            times[name].append(_best(run, expected[name]))
        if turn >= 2 and time.perf_counter() - started > settings.seconds:
            break
    return times


def _best(run: Callable[[], Any], expected: float) -> float:
    """One measurement: seconds of the best of the calls, or groups of very short ones, that fill `SHORT` seconds.

    Where calls are short, the best of a few is what the code takes when the system doesn't give the core to somebody else.
    """
    group = max(1, min(10_000, round(GRAIN / max(expected, 1e-9))))
    end, best = time.perf_counter() + SHORT, math.inf
    while best is math.inf or time.perf_counter() < end:
        best = min(best, _seconds(run, group))
    return best


def _seconds(run: Callable[[], Any], calls: int = 1) -> float:
    started = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - started) / calls


def sgemm_rate(size: int) -> float:
    """GFLOP/s of NumPy's float32 matrix product of size × size: the best of a few, as it stands for the processor's limit."""
    a = np.random.default_rng(0).standard_normal((size, size), np.float32)
    out = np.empty_like(a)
    np.matmul(a, a, out=out)
    return 2 * size**3 / min(_seconds(lambda: np.matmul(a, a, out=out)) for _ in range(5)) / 1e9


def copy_rate(threads: int, floats: int) -> float:
    """GB/s, read and written, of copying float32 from memory to memory on all threads: the best of a few."""
    source, target = np.ones(floats, np.float32), np.zeros(floats, np.float32)
    pairs = list(zip(np.array_split(target, threads), np.array_split(source, threads)))
    with ThreadPoolExecutor(threads) as pool:  # NumPy lets go of the interpreter while it copies
        best = min(_seconds(lambda: list(pool.map(lambda pair: np.copyto(*pair), pairs))) for _ in range(5))
    return 2 * source.nbytes / best / 1e9


def blas_warnings() -> list[str]:
    """Why NumPy's BLAS may be slower than this processor allows."""
    warnings = []
    forced = os.environ.get("OPENBLAS_CORETYPE")
    if forced:
        warnings.append(f"OPENBLAS_CORETYPE={forced} forces BLAS's choice of kernel; unset it unless it is known to be the best")
    flags = processor_flags()
    for library in threadpoolctl.threadpool_info():
        kernel = str(library.get("architecture"))
        above = [name for flag, name, below in VECTORS if flag in flags and kernel in below]
        if library.get("internal_api") == "openblas" and above:
            text = f"BLAS runs its {kernel} kernel, though this processor has {above[0]}; expect half of sgemm's speed or less"
            warnings.append(text)
    return warnings


def processor_flags() -> set[str]:
    """What the processor can do, as Linux names it; nothing where that isn't known."""
    info = Path("/proc/cpuinfo")
    return set(info.read_text().split()) if info.exists() else set()


def load_warnings() -> list[str]:
    """Whether other processes keep the processor busy."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load < 0.5:
        return []
    return [f"something else is running (load {load:.1f}): expect unsteady times, above all where threads wait for each other"]


# OpenBLAS's kernels for x86 by what they are written for: AVX2, or less.
AVX2 = {"Haswell", "Zen", "Excavator"}
OLDER = {"Katmai", "Coppermine", "Northwood", "Banias", "Prescott", "Atom", "Nano", "Core2", "Penryn", "Dunnington", "Nehalem"}
OLDER |= {"Athlon", "Opteron", "Opteron_SSE3", "Barcelona", "Bobcat", "Bulldozer", "Piledriver", "Steamroller", "Sandybridge"}
VECTORS = (("avx512f", "AVX-512", AVX2 | OLDER), ("avx2", "AVX2", OLDER))  # flag, its name, and the kernels that don't use it


# Showing, keeping and comparing.


def table(rows: Iterable[Row], bench: Bench | None = None) -> Table:
    """The one table format."""
    title = None
    if bench:
        where = f"{bench.threads} threads" if bench.settings.device == "cpu" else bench.settings.device
        title = f"{where}; sgemm {bench.sgemm:.0f} GFLOP/s, copy {bench.copy:.0f} GB/s"
        title = escape(f"{where}: {bench.unmeasured}") if bench.unmeasured else title
    shown = Table(title=title, title_justify="left")
    shown.add_column("case")
    for name in ("ours ms", "theirs ms", "ratio", "target", "rate", "share"):
        shown.add_column(name, justify="right")
    shown.add_column("")
    suite = None
    for row in rows:
        if suite not in (None, row["suite"]):
            shown.add_section()
        suite = row["suite"]
        rates, shares = [], []
        if row.get("gflops"):
            rates, shares = [f"{row['gflops']:.0f} GFLOP/s"], [f"{row['share_of_sgemm']:.0%} sgemm"]
        if row.get("gbs"):
            rates, shares = [*rates, f"{row['gbs']:.1f} GB/s"], [*shares, f"{row['share_of_copy']:.0%} copy"]
        remark = f"[red]wrong: {row['wrong']}[/red]" if row.get("wrong") else row.get("remark") or row.get("variant") or ""
        if row.get("unsteady", 1) > UNSTEADY:
            remark += f" (unsteady: {row['unsteady']:.1f})"
        verdict = {None: "", True: " ✓", False: " ✗"}[row.get("met")]
        target = "" if row.get("target") is None else f"{row['target']:g}{verdict}"
        shown.add_row(
            f"{row['suite']}: {row['case']}",
            *(_ms(row["ours_ms"]), _ms(row["theirs_ms"]), _ratio(row), target),
            *(", ".join(rates), ", ".join(shares), remark),
        )
    return shown


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _ratio(row: Row) -> str:
    if row.get("wrong"):
        return "wrong"
    return "" if row.get("ratio") is None else f"{row['ratio']:.2f}"


def save(path: str | Path, rows: Sequence[Row]) -> None:
    """Write rows as a JSON list."""
    from tinydiff.io import write_atomic

    write_atomic(path, (json.dumps(rows, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read(path: str | Path) -> list[Row]:
    """Rows from a file that `save` wrote. Raises ValueError for anything else."""
    try:
        rows = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as benchmark rows ({error}); write it with --json") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and {"suite", "case", "ours_ms"} <= set(row) for row in rows):
        raise ValueError(f"{path}: not a list of benchmark rows; write it with --json")
    return rows


def compare(before: Sequence[Row], after: Sequence[Row]) -> Table:
    """The cases that both have, side by side. Ratios to the opponent bear comparison across runs; times alone hardly do."""
    shown = Table(title="change: how many times as fast as before, by the ratios where both have one", title_justify="left")
    shown.add_column("case")
    for name in ("ms before", "ms after", "ratio before", "ratio after", "change"):
        shown.add_column(name, justify="right")
    earlier = {(row["suite"], row["case"]): row for row in before}
    for row in after:
        old = earlier.get((row["suite"], row["case"]))
        if old is not None:
            times = _ms(old["ours_ms"]), _ms(row["ours_ms"])
            shown.add_row(f"{row['suite']}: {row['case']}", *times, _ratio(old), _ratio(row), _change(old, row))
    return shown


def _change(old: Row, new: Row) -> str:
    if old.get("ratio") and new.get("ratio"):
        return f"{new['ratio'] / old['ratio']:.2f}"
    if old["ours_ms"] and new["ours_ms"]:
        return f"{old['ours_ms'] / new['ours_ms']:.2f} (by times)"
    return ""
