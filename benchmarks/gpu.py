"""Timing on a GPU, and what a card could do at best.

By these rules: results are checked before anything is timed. Times are of the GPU's own clock (events), after a warm-up. A cold
measurement follows a write larger than the second-level cache; that write also keeps the GPU busy while Python queues what is
measured, so its launch is not part of the time. A warm one queues many calls in a row. Contenders take turns; medians count, and
their spread is shown. The clock rates before and after say whether the card held its speed.

Every number is labelled: "measured" on this GPU, "model" (roofline: the least time that a card's published rates allow), or
"not measured". The simulated GPU checks results and has no times.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from tinydiff import backend


class Card(NamedTuple):
    """What a data sheet says: TFLOP/s of dense products by precision (None: can't), memory in GB/s, second-level cache in MB.

    bfloat16 is with sums in float32.
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    tflops: dict[str, float | None]
    bandwidth: float
    cache: float


CARDS = {  # NVIDIA's data sheets and architecture white papers: boost clock, no sparsity
    "t4": Card("Tesla T4", (7, 5), 40, {"float32": 8.1, "tf32": None, "bf16": None}, 320, 4),
    "a100": Card("A100 SXM 80 GB", (8, 0), 108, {"float32": 19.5, "tf32": 156, "bf16": 312}, 2039, 40),
    "rtx3090": Card("GeForce RTX 3090", (8, 6), 82, {"float32": 35.6, "tf32": 35.6, "bf16": 71}, 936, 6),
    "rtx4090": Card("GeForce RTX 4090", (8, 9), 128, {"float32": 82.6, "tf32": 82.6, "bf16": 165.2}, 1008, 72),
    "h100": Card("H100 SXM", (9, 0), 132, {"float32": 66.9, "tf32": 494.7, "bf16": 989.4}, 3350, 50),
}


class Roofline(NamedTuple):
    """The least seconds that a work can take on a card, and which of "compute" and "memory" asks for them."""

    seconds: float
    bound: str


def roofline(card: Card, precision: str, flops: float, nbytes: float) -> Roofline | None:
    """The larger of computing at the peak rate and moving at full bandwidth (Williams et al. 2009); None if the card can't."""
    peak = card.tflops[precision]
    if peak is None:
        return None
    compute, memory = flops / (peak * 1e12), nbytes / (card.bandwidth * 1e9)
    return Roofline(max(compute, memory), "compute" if compute >= memory else "memory")


def missing(device: str) -> str | None:
    """Why nothing can be measured on a device; None if it can."""
    if device == "cudasim":
        return "simulated: its time means nothing"
    try:
        backend.check_device(device)
    except RuntimeError as error:
        return str(error)
    from tinydiff.kernels import cuda

    return None if cuda.extension(device) else f"tinydiff was installed without its kernels for {device}; see tinydiff doctor"


@dataclass
class Times:
    """Seconds a call: of each cold measurement, and of each of the calls in a row."""

    cold: list[float]
    warm: list[float]

    @property
    def seconds(self) -> float:
        """The median of the cold ones."""
        return statistics.median(self.cold)

    @property
    def warm_seconds(self) -> float:
        """The median of those in a row."""
        return statistics.median(self.warm)

    @property
    def spread(self) -> float:
        """How far the middle half of the cold ones reaches, as a part of the median."""
        if len(self.cold) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.cold, n=4, method="inclusive")
        return (high - low) / self.seconds


class Stopwatch:
    """The current GPU's events, by CuPy.

    Attributes:
        cache: bytes that are written to empty the second-level cache of what it holds.
    """

    WARMUP = 3
    WARM_SECONDS = 0.01  # what the calls in a row shall fill

    def __init__(self, xp: Any) -> None:
        self.cuda = xp.cuda
        self.cache = 4 * max(int(xp.cuda.Device().attributes.get("L2CacheSize", 0)), 16 << 20)
        self.dirt = xp.zeros(self.cache // 4, "float32")

    def flush(self) -> None:
        """Write more than the cache holds (twice: long enough for what comes next to be queued meanwhile)."""
        self.dirt += 1
        self.dirt += 1

    def once(self, run: Callable[[], Any], calls: int = 1) -> float:
        """Seconds a call of `calls` in a row, from when the GPU comes to them to when it has done them."""
        begin, end = self.cuda.Event(), self.cuda.Event()
        self.flush()
        begin.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return self.cuda.get_elapsed_time(begin, end) / 1000 / calls

    def measure(self, contenders: dict[str, Callable[[], Any]], repeat: int) -> dict[str, Times]:
        """The times of each, in turn, after a warm-up."""
        calls = {}
        for name, run in contenders.items():
            seconds = [self.once(run) for _ in range(self.WARMUP)]
            calls[name] = max(2, min(1000, round(self.WARM_SECONDS / max(min(seconds), 1e-7))))
        times = {name: Times([], []) for name in contenders}
        for _ in range(repeat):
            for name, run in contenders.items():
                times[name].cold.append(self.once(run))
                times[name].warm.append(self.once(run, calls[name]))
        return times


@dataclass
class Rates:
    """What this very GPU does in this run: GB/s of copying, read and written, and GFLOP/s of matrix products by precision."""

    copy: float
    matrix: dict[str, float]


def rates(watch: Stopwatch, xp: Any, torch: Any = None, size: int = 8192, repeat: int = 5) -> Rates:
    """Copying ½ GB, and products of matrices of `size` × `size` by cuBLAS: in float32 through CuPy, rounded through PyTorch."""
    source, target = xp.ones(1 << 27, "float32"), xp.empty(1 << 27, "float32")
    times = watch.measure({"copy": lambda: xp.copyto(target, source)}, repeat)
    copy = 2 * source.nbytes / min(times["copy"].cold) / 1e9
    a = xp.ones((size, size), "float32")
    products: dict[str, Callable[[], Any]] = {"float32": lambda: xp.matmul(a, a)}
    if torch:
        b, half = (torch.ones(size, size, device="cuda", dtype=d) for d in (torch.float32, torch.bfloat16))

        def rounded() -> Any:
            with tf32(torch, True):
                return b @ b

        products |= {"tf32": rounded, "bf16": lambda: half @ half}
    times = watch.measure(products, repeat)
    return Rates(copy, {name: 2 * size**3 / min(t.cold) / 1e9 for name, t in times.items()})


@contextmanager
def tf32(torch: Any, allowed: bool) -> Iterator[None]:
    """Inside the block PyTorch's products and convolutions of float32 may round their factors to TF32, or may not."""
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = allowed
        yield
    finally:
        for switch, value in zip(switches, before):
            switch.allow_tf32 = value


def clocks() -> str | None:
    """The card's name, clock of its multiprocessors, the highest one, temperature and power, as nvidia-smi says; None without."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = "name,clocks.sm,clocks.max.sm,temperature.gpu,power.draw"
    done = subprocess.run([tool, f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True, check=False)
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None
