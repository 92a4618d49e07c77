"""Watching a run: what computed what and how fast, the first value that stopped being finite, and peak memory.

Each is a block that adds an observer to `tinydiff.op.OBSERVERS`; outside such a block nothing is measured and nothing paid.
"""

from __future__ import annotations

import io
import math
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

from tinydiff.autograd import STATE
from tinydiff.backend import Array, array_module
from tinydiff.op import OBSERVERS, Call, Op, _engine_files

if TYPE_CHECKING:
    from rich.table import Table


@contextmanager
def observing(observer: Callable[[Call], None]) -> Iterator[None]:
    """A block in which `observer` is shown every op that is computed, forward and backward; nothing is replayed there."""
    OBSERVERS.append(observer)
    try:
        yield
    finally:
        OBSERVERS.remove(observer)


def _phase(call: Call) -> str:
    """ "forward", "backward", or "recompute" for what a checkpoint runs again during backward."""
    if STATE.region is not None and STATE.region.recording is not None:
        return "recompute"
    return "forward" if STATE.node is None else "backward"


def _op(call: Call) -> Op:
    return call[0]  # for type checkers: `call.op` would be an Op bound as a method


def _is_backward_kernel(call: Call) -> bool:
    return call.who.endswith(" backward")


def _results(call: Call) -> list[Array]:
    """The arrays a call made: one, or the gradients of a kernel's backward (None for those nobody asked for)."""
    results = call.result if isinstance(call.result, tuple) else (call.result,)
    return [r for r in results if r is not None]


# Which kernel ran, and how fast.


@dataclass
class Row:
    """What one op cost in one phase under one implementation, over all its calls.

    Attributes:
        op: the op's name. phase: "forward", "backward" or "recompute" (a checkpoint's second run).
        who: "definition", or the backend of the kernel that ran ("numpy"). calls: how many. seconds: their sum.
        flops: floating-point operations, as the op declares them; a kernel's backward counts twice its forward, by custom.
        bytes: of distinct memory that inputs and results span, each counted once a call; views count nothing.
    """

    op: str
    phase: str
    who: str
    calls: int = 0
    seconds: float = 0.0
    flops: float = 0.0
    bytes: int = 0

    @property
    def gflops_per_second(self) -> float:
        """10⁹ floating-point operations a second."""
        return self.flops / self.seconds / 1e9 if self.seconds else 0.0

    @property
    def gbytes_per_second(self) -> float:
        """10⁹ bytes a second."""
        return self.bytes / self.seconds / 1e9 if self.seconds else 0.0


class Profile:
    """What `profile()` collected. Print it for a table, or read `rows`; `elapsed` is the block's wall time in seconds."""

    def __init__(self) -> None:
        self.elapsed = 0.0
        self._rows: dict[tuple[str, str, str], Row] = {}

    @property
    def rows(self) -> list[Row]:
        """One Row for each op, phase and implementation, the most expensive first."""
        return sorted(self._rows.values(), key=lambda row: -row.seconds)

    def __call__(self, call: Call) -> None:
        key = (_op(call).name, _phase(call), call.who.removesuffix(" backward"))
        row = self._rows.get(key)
        if row is None:
            row = self._rows[key] = Row(*key)
        row.calls += 1
        row.seconds += call.seconds
        results, arrays = _results(call), [a for a in call.inputs if hasattr(a, "nbytes")]
        if _op(call).view and any(owner(r) is owner(a) for r in results for a in arrays):
            return
        row.flops += _flops(call)
        row.bytes += sum(span(a) for a in {id(a): a for a in (*arrays, *results)}.values())

    def table(self) -> Table:
        """The rows as a rich Table, with their sum and the block's time outside of ops (Python and the tape) below."""
        from rich.table import Table

        table = Table("op", "phase", "who", *[_right(name) for name in ("calls", "ms", "share", "GFLOP/s", "GB/s")])
        every = Row("all ops", "", "")
        for row in self.rows:
            who = row.who if row.who == "definition" else f"{row.who} kernel"
            table.add_row(row.op, row.phase, who, *self._figures(row))
            every.calls += row.calls
            every.seconds += row.seconds
            every.flops += row.flops
            every.bytes += row.bytes
        table.add_section()
        table.add_row(every.op, "", "", *self._figures(every))
        table.add_row("outside ops", "", "", "", *self._time(max(self.elapsed - every.seconds, 0.0)), "", "")
        return table

    def _figures(self, row: Row) -> list[str]:
        speeds = [f"{v:.1f}" if v else "–" for v in (row.gflops_per_second, row.gbytes_per_second)]
        return [str(row.calls), *self._time(row.seconds), *speeds]

    def _time(self, seconds: float) -> tuple[str, str]:
        return f"{seconds * 1e3:.2f}", f"{seconds / self.elapsed:.1%}" if self.elapsed else "–"

    def __rich__(self) -> Table:
        return self.table()

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=100).print(self.table())
        return text.getvalue()


def _right(name: str) -> Any:
    from rich.table import Column

    return Column(name, justify="right")


def _flops(call: Call) -> float:
    if not _is_backward_kernel(call):
        return _op(call).flops(call.result, *call.inputs, **call.params)
    gradient, *saved = call.inputs  # the gradient has the result's shape
    saved += [None] * (len(_op(call).inputs) - len(saved))
    try:
        return 2 * _op(call).flops(gradient, *saved, **call.params)
    except (AttributeError, TypeError):  # the count reads an input that the backward had no need of
        return 0.0


def owner(array: Array) -> Array:
    """The array whose memory `array` is a view of, or itself."""
    while isinstance(getattr(array, "base", None), type(array)):
        array = array.base
    return array


def span(array: Array) -> int:
    """Bytes of memory behind an array: an axis that broadcasting repeats (stride 0) is there once."""
    return math.prod(n for n, stride in zip(array.shape, array.strides) if stride or not n) * array.itemsize


@contextmanager
def profile() -> Iterator[Profile]:
    """Count every computation in the block, of all threads: yields a Profile, to be printed afterwards.

    Times are of the ops alone; the first call of a kernel includes its compilation, or loading it from the cache.
    """
    found = Profile()
    started = perf_counter()
    with observing(found):
        try:
            yield found
        finally:
            found.elapsed = perf_counter() - started


# The first value that is not finite.


class NonFinite:
    """What `first_nonfinite` found: `message` describes it, None as long as all is finite."""

    def __init__(self, raises: bool) -> None:
        self.raises = raises
        self.message: str | None = None

    def __call__(self, call: Call) -> None:
        if self.message is not None:
            return
        for result in _results(call):
            kind = _nonfinite(result)
            if kind is None:
                continue
            sources = [(name, _nonfinite(x)) for name, x in _named_inputs(call)]
            if kind == "inf" and any(source is not None for _, source in sources):
                continue  # handed on, as a mask of -inf is on purpose; what becomes NaN of it is caught
            carriers = [name for name, source in sources if source == "nan"]
            self.message = _describe(call, result, kind, carriers)
            if self.raises:
                raise FloatingPointError(self.message)
            return


def _nonfinite(x: Any) -> str | None:
    """ "nan" if x holds one, else "inf" if x holds an infinity, else None."""
    if isinstance(x, float):
        return "nan" if math.isnan(x) else "inf" if math.isinf(x) else None
    if not hasattr(x, "dtype") or x.dtype.kind != "f":
        return None
    xp = array_module(x)
    if xp.isfinite(x).all():
        return None
    return "nan" if xp.isnan(x).any() else "inf"


def _named_inputs(call: Call) -> list[tuple[str, Any]]:
    inputs = list(call.inputs)
    if not _is_backward_kernel(call):
        return list(zip(input_names(_op(call), len(inputs)), inputs))
    return [("gradient", inputs[0]), *zip(input_names(_op(call), len(inputs) - 1), inputs[1:])]


def input_names(op: Op, count: int) -> Sequence[str]:
    """Names of an op's inputs; those of one that takes any number are numbered."""
    return [f"{op.inputs[0]}[{i}]" for i in range(count)] if op.variadic else op.inputs


def _describe(call: Call, result: Array, kind: str, carriers: list[str]) -> str:
    xp = array_module(result)
    bad = int((~xp.isfinite(result)).sum())
    name = _op(call).name
    if STATE.node is None:
        where = f"{name} (forward, called at {_caller()})"
    elif _is_backward_kernel(call):
        where = f"the backward of {name} (called at {STATE.node.line()})"
    else:
        where = f"{name} in the backward of {STATE.node.op.name} (called at {STATE.node.line()})"
    what = f"first {kind}: {where} gave {bad} of {result.size} values that are not finite, shape {result.shape} {result.dtype}"
    if carriers:
        what += f"; nan came in with {', '.join(carriers)}"
    given = [f"{name} {_range(x)}" for name, x in _named_inputs(call) if x is not None]
    return f"{what}; inputs: {', '.join(given) or 'none'}"


def _range(x: Any) -> str:
    """Shape, dtype and the smallest and largest value that is no NaN."""
    if not hasattr(x, "dtype"):
        return repr(x)
    xp = array_module(x)
    known = x[~xp.isnan(x)] if x.dtype.kind == "f" else x
    values = f" in [{float(known.min()):.4g}, {float(known.max()):.4g}]" if known.size else ""
    return f"{x.shape} {x.dtype}{values}"


def _caller() -> str:
    """The line outside of the engine that called the op being observed, as "file:line"."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename in {*_engine_files, __file__}:
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


@contextmanager
def first_nonfinite(raises: bool = True) -> Iterator[NonFinite]:
    """Find the first op in the block that gives a NaN or an infinity, forward or backward.

    Raises FloatingPointError there, naming the op, the line of its forward call, shapes and the range of its inputs; with
    `raises=False` the block goes on, and the text is left in `.message` of the object yielded. An infinity that an input
    already held may pass (masks of -inf are made so); NaN never does, and when it came in with an input, the text says so.
    Every result is scanned, so use it to look for a cause, on the step that went wrong, not in every step.
    """
    found = NonFinite(raises)
    with observing(found):
        yield found


# Memory.


class Memory:
    """Bytes of op results alive now (`live`), and the most there were at once (`peak`)."""

    def __init__(self) -> None:
        self.live = self.peak = 0
        self._alive: dict[int, weakref.ref] = {}

    def __call__(self, call: Call) -> None:
        given = {id(owner(x)) for x in call.inputs if hasattr(x, "nbytes")}
        for result in _results(call):
            array = owner(result)
            key = id(array)
            if key in given or key in self._alive:  # a view of an input
                continue
            self._alive[key] = weakref.ref(array, lambda _, key=key, size=array.nbytes: self._free(key, size))  # type: ignore[misc]
            self.live += array.nbytes
        self.peak = max(self.peak, self.live)

    def _free(self, key: int, size: int) -> None:
        del self._alive[key]
        self.live -= size


@contextmanager
def peak_memory() -> Iterator[Memory]:
    """Measure the most bytes that results of ops in the block took at once: yields a Memory; read its `peak`.

    It counts arrays, not the process's resident memory: allocators keep freed pages and libraries their buffers, so that
    figure neither falls when a graph is freed nor comes out the same twice, and this one does both. What was made before
    the block, and what kernels and definitions use inside while they run, is not counted.
    """
    found = Memory()
    with observing(found):
        yield found
    found._alive.clear()
