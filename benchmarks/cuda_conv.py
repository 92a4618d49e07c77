"""The CUDA convolutions: every version in every direction and precision, against cuDNN and against what the card could do.

Rows are labelled (see `benchmarks.gpu`). On the simulated GPU every result is checked and nothing is timed; without a GPU there
is the roofline model of a card that you name, and "not measured" beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks import gpu
from benchmarks.conv import OTHERS, STRIDE_1, Shape, arrays
from benchmarks.harness import Row, difference, import_torch
from tinydiff import backend
from tinydiff.kernels import convrule
from tinydiff.ops.conv import _conv2d, _conv2d_input_grad, _conv2d_weight_grad, padding_pairs

PRECISIONS = ("float32", "tf32", "bf16")
TOLERANCES = {"float32": 1e-4, "tf32": 4e-3, "bf16": 2e-2}  # of the largest element of the result in double precision
SIMULATED = [  # small, and each version can do one of them
    Shape(1, 6, 7, 8, 16, 3),
    Shape(1, 7, 6, 3, 8, 3, 1, 1),
    Shape(1, 6, 6, 16, 8, 3, 2),
    Shape(1, 5, 5, 8, 8, 1, 1, 0),
]
NAMES = {"forward": "forward", "input_grad": "input gradient", "weight_grad": "weight gradient"}


def conv_size(shape: Shape) -> convrule.ConvSize:
    """The shape as the launchers take it."""
    (p, q), pad = shape.out, shape.p
    return convrule.ConvSize(shape.n, shape.h, shape.w, shape.c, shape.o, shape.k, shape.k, p, q, shape.s, shape.s, pad, pad)


# What a version has to do.


@dataclass(frozen=True)
class Work:
    """Floating-point operations and bytes of memory traffic."""

    flops: float
    bytes: float


def traffic(shape: Shape) -> float:
    """Bytes when each of x, w and y crosses the memory's border once: the least for any convolution of float32 arrays."""
    return 4.0 * (
        shape.n * shape.h * shape.w * shape.c + shape.k**2 * shape.c * shape.o + shape.n * shape.out[0] * shape.out[1] * shape.o
    )


def work(version: str, direction: str, shape: Shape, scratch: float = 0.0) -> Work:
    """Of one version: `scratch` bytes of workspace are written once and read once; Winograd multiplies 16 times for 4 results."""
    flops = shape.flops
    if version == "wino_f2":
        image, (h, w) = (shape.c, shape.out) if direction == "forward" else (shape.o, (shape.h, shape.w))
        flops = 2.0 * 16 * shape.n * -(-h // 2) * -(-w // 2) * image * (shape.c + shape.o - image)
    return Work(flops, traffic(shape) + 2 * scratch)


def workspace(module: Any, version: str, direction: str, precision: str, shape: Shape) -> float:
    """Bytes of workspace, as the launcher says; 0 where no launchers were built."""
    if module is None:
        return 0.0
    indices = convrule.VERSIONS.index(version), convrule.DIRECTIONS.index(direction), convrule.PRECISIONS.index(precision)
    return module.conv2d_workspace(*indices, *conv_size(shape), 0)


def contenders(shape: Shape, capability: tuple[int, int] = (8, 0)) -> Iterator[tuple[str, str, str]]:
    """(direction, version, precision) of all that can do the shape on a GPU of that capability with aligned arrays."""
    for direction in convrule.DIRECTIONS:
        for version in convrule.VERSIONS:
            for precision in PRECISIONS:
                if convrule.takes(version, direction, conv_size(shape), precision, capability, True):
                    yield direction, version, precision


# The contenders.


def ours(direction: str, version: str, precision: str, shape: Shape, device: str) -> Callable[[], Any]:
    """A function that launches one version on arrays that lie on the device."""
    from tinydiff.kernels import cuda

    x, w, gy = (backend.to_device(a, device) for a in arrays(shape))
    where: dict[str, Any] = {"stride": (shape.s, shape.s), "padding": padding_pairs(shape.p), "force": version}
    calls: dict[str, Callable[[], Any]] = {
        "forward": lambda: cuda.conv2d(x, w, None, None, **where),
        "input_grad": lambda: cuda.conv2d_input_grad(gy, w, input_size=(shape.h, shape.w), **where),
        "weight_grad": lambda: cuda.conv2d_weight_grad(x, gy, kernel_size=(shape.k, shape.k), **where),
    }

    def run() -> Any:
        with cuda.precision(precision):
            return calls[direction]()

    return run


def cudnn(torch: Any, direction: str, precision: str, shape: Shape) -> tuple[Callable[[], Any], Callable[[Any], np.ndarray]]:
    """PyTorch's convolution on the GPU, channels last, rounding as `precision` says; and its result as ours is laid out."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    x, w, gy = (torch.from_numpy(a).to("cuda", dtype) for a in arrays(shape))
    x, gy, w = x.permute(0, 3, 1, 2), gy.permute(0, 3, 1, 2), w.permute(3, 2, 0, 1)
    w = w.contiguous(memory_format=torch.channels_last)
    layout = {"forward": (0, 2, 3, 1), "input_grad": (0, 2, 3, 1), "weight_grad": (2, 3, 1, 0)}[direction]
    mask = [direction == "input_grad", direction == "weight_grad", False]

    def run() -> Any:
        with gpu.tf32(torch, precision == "tf32"):
            if direction == "forward":
                return torch.nn.functional.conv2d(x, w, None, shape.s, shape.p)
            pair = ([shape.s] * 2, [shape.p] * 2, [1, 1])
            found = torch.ops.aten.convolution_backward(gy, x, w, None, *pair, False, [0, 0], 1, mask)
            return found[mask.index(True)]

    return run, lambda result: result.float().permute(*layout).cpu().numpy()


def reference(direction: str, shape: Shape) -> np.ndarray:
    """The definition on the CPU, in double precision."""
    x, w, gy = (a.astype(np.float64) for a in arrays(shape))
    where: dict[str, Any] = {"stride": (shape.s, shape.s), "padding": padding_pairs(shape.p)}
    if direction == "forward":
        return _conv2d.op.definition(np, x, w, **where)
    if direction == "input_grad":
        return _conv2d_input_grad.op.definition(np, gy, w, input_size=(shape.h, shape.w), **where)
    return _conv2d_weight_grad.op.definition(np, x, gy, kernel_size=(shape.k, shape.k), **where)


# The suite.


class Session:
    """One run of the suite on a device, and its rows.

    Attributes:
        reason: why nothing is measured, or None. card: whose roofline is the model.
        rates: what this GPU was measured to do, or None.
    """

    def __init__(self, device: str, card: gpu.Card, repeat: int = 9, against: str | None = None, quick: bool = False) -> None:
        from tinydiff.kernels import cuda

        self.device, self.card, self.repeat = device, card, 3 if quick else repeat
        self.reason = gpu.missing(device)
        if device == "cudasim" and cuda.extension(device) is None:
            raise RuntimeError("the simulated kernels were not built when tinydiff was installed; see tinydiff doctor")
        self.kernels = cuda.extension(device) or cuda.extension("cudasim")  # these say how much workspace they need
        self.rows: list[Row] = []
        self.rates: gpu.Rates | None = None
        self.torch: Any = None
        self.watch: Any = None
        self.capability = (8, 0) if device == "cudasim" else card.capability
        if self.reason is None:
            xp = backend.module_of(device)
            self.torch = import_torch() if against == "torch" else None
            if self.torch:
                self.torch.backends.cudnn.benchmark = True  # it tries its algorithms during the warm-up and keeps the best
            number = xp.cuda.Device().compute_capability
            self.capability = int(number[:-1]), int(number[-1])
            self.watch = gpu.Stopwatch(xp)
            self.rates = gpu.rates(self.watch, xp, self.torch, 2048 if quick else 8192)

    def run(self, shapes: Sequence[Shape]) -> list[Row]:
        """All contenders of all shapes, as rows."""
        for shape in shapes:
            answers: dict[str, np.ndarray] = {}
            for direction, version, precision in contenders(shape, self.capability):
                if direction not in answers and (self.device == "cudasim" or self.reason is None):
                    answers[direction] = reference(direction, shape)
                self.rows.append(self.row(direction, version, precision, shape, answers.get(direction)))
        return self.rows

    def row(self, direction: str, version: str, precision: str, shape: Shape, answer: np.ndarray | None) -> Row:
        """Check, then time, one version. `answer` is the result in double precision; None where the version can't be run."""
        done = work(version, direction, shape, workspace(self.kernels, version, direction, precision, shape))
        row: Row = {"suite": "conv cuda", "case": f"{shape}, {NAMES[direction]}: {version} {precision}"}
        row |= {"direction": direction, "version": version, "precision": precision, "device": self.device}
        row |= {
            "ours_ms": None,
            "theirs_ms": None,
            "ratio": None,
            "wrong": None,
            "error": None,
            "tolerance": TOLERANCES[precision],
        }
        row |= {"kind": "not measured", "reason": self.reason, "flops": done.flops, "bytes": done.bytes}
        least = gpu.roofline(self.card, precision, done.flops, done.bytes)
        row |= {"model_card": self.card.name, "model_ms": 1000 * least.seconds if least else None}
        row["model_bound"] = least.bound if least else None
        if answer is None:
            return row
        run = ours(direction, version, precision, shape, self.device)
        found = backend.to_numpy(run())
        row["error"] = float(np.abs(found - answer).max() / max(float(np.abs(answer).max()), 1e-30))
        row["wrong"] = difference([found], [answer], TOLERANCES[precision])
        if self.watch is None:
            row["kind"] = "simulated"
        elif row["wrong"] is None:
            self._measure(row, run, direction, precision, shape, answer)
        return row

    def _measure(
        self, row: Row, run: Callable[[], Any], direction: str, precision: str, shape: Shape, answer: np.ndarray
    ) -> None:
        sides = {"ours": run}
        if self.torch:
            theirs, as_array = cudnn(self.torch, direction, precision, shape)
            row["wrong"] = difference([as_array(theirs())], [answer], TOLERANCES[precision])
            if row["wrong"]:
                row["wrong"] += " (cuDNN)"
                return
            sides["theirs"] = theirs
        self.record(row, self.watch.measure(sides, self.repeat))

    def record(self, row: Row, times: dict[str, gpu.Times]) -> None:
        """Enter what was measured, and what follows from it."""
        mine = times["ours"]
        row |= {"kind": "measured", "ours_ms": 1000 * mine.seconds, "spread": mine.spread}
        row["ours_warm_ms"] = 1000 * mine.warm_seconds
        row["gflops"], row["gbs"] = row["flops"] / mine.seconds / 1e9, row["bytes"] / mine.seconds / 1e9
        if self.rates:
            row["share_of_copy"] = row["gbs"] / self.rates.copy
            rate = self.rates.matrix.get(row["precision"])
            row["share_of_matrix"] = row["gflops"] / rate if rate else None
        if "theirs" in times:
            row |= {"theirs_ms": 1000 * times["theirs"].seconds, "theirs_warm_ms": 1000 * times["theirs"].warm_seconds}
            row["ratio"] = row["theirs_ms"] / row["ours_ms"]


def shapes_for(device: str, quick: bool) -> list[Shape]:
    """The suite's shapes: what `conv` measures on the CPU, or ones that a simulator can do."""
    if device == "cudasim":
        return SIMULATED[:1] if quick else SIMULATED
    return [*STRIDE_1, *OTHERS][: 2 if quick else None]


def table(session: Session) -> Table:
    """The rows for people, with what the times are."""
    title = f"every time: not measured ({escape(session.reason)})" if session.reason else "medians of cold calls on this GPU"
    if session.rates:
        matrix = ", ".join(f"{name} {rate / 1000:.1f} TFLOP/s" for name, rate in session.rates.matrix.items())
        title += f"; it copies {session.rates.copy:.0f} GB/s and multiplies matrices at {matrix}"
    title += f"\nmodel: the least that the data sheet of a {session.card.name} allows; nobody measured it"
    shown = Table(title=title, title_justify="left")
    for name in ("case", "ours ms", "± half", "in a row", "cuDNN ms", "ratio", "matrix", "copy", "model ms", "bound by", "error"):
        shown.add_column(name, justify="left" if name in ("case", "bound by") else "right")
    for row in session.rows:
        unknown = "simulated" if row["kind"] == "simulated" else "not measured"
        measured = row["kind"] == "measured"
        shown.add_row(
            row["case"],
            _ms(row["ours_ms"]) if measured else f"[red]wrong: {row['wrong']}[/red]" if row["wrong"] else unknown,
            f"{row['spread']:.0%}" if measured else "",
            _ms(row["ours_warm_ms"]) if measured else "",
            _ms(row["theirs_ms"]) if row["theirs_ms"] is not None else "",
            f"{row['ratio']:.2f}" if row["ratio"] is not None else "",
            f"{row['share_of_matrix']:.0%}" if row.get("share_of_matrix") else "",
            f"{row['share_of_copy']:.0%}" if row.get("share_of_copy") else "",
            _ms(row["model_ms"]) if row["model_ms"] is not None else "can't",
            row["model_bound"] or "",
            f"{row['error']:.0e}" if row["error"] is not None else "",
        )
    return shown


def _ms(value: float) -> str:
    return f"{value:.3g}"


def run(session: Session, shapes: Sequence[Shape], console: Console) -> list[Row]:
    """The suite, printed."""
    before = gpu.clocks() if session.reason is None else None
    session.run(shapes)
    console.print(table(session))
    if before:
        console.print(f"card, clock, highest clock, temperature, power: {before} before, {gpu.clocks()} after")
    return session.rows
