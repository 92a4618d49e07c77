"""What a kernel family tells the frame, and one run of it with all its checks."""

from __future__ import annotations

import functools
import importlib
import pkgutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.cudacheck.launchers import Launchers, Program
from tests.cudacheck.pairwise import Row, pairwise
from tinydiff.cudasim import SCHEDULES, Memory, Requests
from tinydiff.cudasim.build import csrc

OFFSETS = {4: 0, 2: 2, 1: 1}  # alignment in elements: how far arrays lie from a multiple of 256 bytes


@dataclass
class Run:
    """One call of a launcher and what must come out.

    `inputs` are read only; `outputs` and `workspaces` are written, and hold NaN before (0x7f7f... for integers); an array in
    `updated` is read and written. `expected[name]` is the answer in double precision and how far each element may be from it.
    `refused` says that the launcher must return an error and touch nothing (an alignment it can't take, say).
    """

    launcher: str
    arguments: Sequence[Any]  # numbers, Array("x") for the address of one of the arrays below, None for null
    inputs: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]
    expected: Mapping[str, tuple[np.ndarray, Any]]
    workspaces: Mapping[str, np.ndarray] = field(default_factory=dict)
    updated: Mapping[str, np.ndarray] = field(default_factory=dict)
    refused: bool = False


@dataclass(frozen=True)
class Family:
    """Kernels that are checked together.

    `axes` are the problem's; alignment (of all arrays, in elements), schedule and, with `copies`, late or early asynchronous
    copies are added. `run(**row)` makes the run of one combination; `valid(row)` says which combinations there are.
    `own` are the sources that are checked, where `sources` has others that are only linked. `typical` are combinations that fill
    a tile, for which bank conflicts are counted (conflicts.py).
    """

    name: str
    sources: Sequence[Path]
    header: Path
    axes: Mapping[str, Sequence[Any]]
    run: Callable[..., Run]
    valid: Callable[[Row], bool] = lambda row: True
    copies: bool = False
    alignments: Sequence[int] = (4, 2, 1)
    architecture: int = 80
    own: Sequence[Path] = ()
    typical: Sequence[Row] = ()

    @functools.cached_property
    def rows(self) -> list[Row]:
        axes = {**self.axes, "alignment": self.alignments, "schedule": SCHEDULES}
        if self.copies:
            axes["copies"] = ("late", "early")
        return pairwise(axes, self.valid)

    @functools.cached_property
    def launchers(self) -> Launchers:
        return Launchers(self.sources, self.header)

    def program(self, sanitizer: str) -> Program:
        return Program(self.sources, self.header, sanitizer)


def kernel_family(
    name: str, sources: Sequence[str], axes: Mapping[str, Sequence[Any]], run: Callable[..., Run], **more: Any
) -> Family:
    """A family of csrc/: sources by file name, launchers declared in csrc/kernels.h."""
    return Family(name, [csrc() / source for source in sources], csrc() / "kernels.h", axes, run, **more)


def families() -> dict[str, Family]:
    """All families that families/*.py list as FAMILIES."""
    package = importlib.import_module("tests.cudacheck.families")
    found: dict[str, Family] = {}
    for module in pkgutil.iter_modules(package.__path__):
        for family in importlib.import_module(f"{package.__name__}.{module.name}").FAMILIES:
            found[family.name] = family
    return found


@dataclass(frozen=True)
class Failure:
    check: str  # the kind of a finding, or: answer, order, launch
    message: str


def _poison(array: np.ndarray) -> np.ndarray:
    if array.dtype.kind == "f":
        return np.full_like(array, np.nan)
    return np.frombuffer(b"\x7f" * array.nbytes, array.dtype).reshape(array.shape).copy()


def problem(family: Family, row: Row) -> Run:
    return family.run(**{name: value for name, value in row.items() if name not in ("schedule", "copies")})


def check(family: Family, row: Row, mutant: int = 0) -> tuple[list[Failure], int]:
    """Run one combination with all checks. Returns what failed and how often the mutant was reached."""
    run = problem(family, row)
    settings = {
        "schedule": row["schedule"],
        "late_copies": row.get("copies") != "early",
        "mutant": mutant,
        "architecture": family.architecture,
    }
    failures, results, hits, _ = execute(family, run, row["alignment"], {**settings, "seed": 1})
    if not failures and row["schedule"] == "random":  # the order of threads must not change a bit
        again, other, _, _ = execute(family, run, row["alignment"], {**settings, "seed": 2})
        failures += again
        failures += [
            Failure("order", f"{name} depends on the order in which threads run")
            for name in run.expected
            if results[name].tobytes() != other[name].tobytes()
        ]
    return failures, hits


def execute(
    family: Family, run: Run, alignment: int, settings: dict[str, Any]
) -> tuple[list[Failure], dict[str, np.ndarray], int, list[Requests]]:
    """One call on the simulator: what failed, the results, how often the mutant was reached, and the recorded requests."""
    simulator = family.launchers.simulator
    arrays = {
        **run.inputs,
        **run.updated,
        **{name: _poison(array) for name, array in {**run.outputs, **run.workspaces}.items()},
    }
    memory = {name: Memory(array, offset=OFFSETS[alignment]) for name, array in arrays.items()}
    tracked = [(name, piece, name not in run.inputs) for name, piece in memory.items()]
    pointers = {name: piece.pointer for name, piece in memory.items()}
    with simulator.settings(**settings), simulator.tracked(tracked):
        error = family.launchers.call(run.launcher, run.arguments, pointers)
        findings = simulator.findings()
        hits = simulator.mutant_hits()
        requests = simulator.requests() if settings.get("record") else []
        message = family.launchers.message(error) if error else ""
    failures = [Failure(f.kind, str(f)) for f in findings]
    if not findings and bool(error) != run.refused:
        failures.append(Failure("launch", message or "the launcher takes what it should refuse"))
    for name, piece in memory.items():
        if damage := piece.damage():
            failures.append(Failure("bounds", f"{name} was written {damage}"))
    results = {name: memory[name].array.copy() for name in run.expected}
    if not failures and not run.refused:
        failures += compare(run, results)
    return failures, results, hits, requests


def compare(run: Run, results: Mapping[str, np.ndarray]) -> list[Failure]:
    """The answers that are not what they should be."""
    failures = []
    for name, (expected, bound) in run.expected.items():
        got = results[name].astype(np.float64)
        wrong = ~(np.abs(got - expected) <= bound)  # NaN is wrong
        if wrong.any():
            first = tuple(int(i) for i in np.argwhere(wrong)[0])
            one = f"{name}{list(first)} is {got[first]:.9g}, not {expected[first]:.9g}"
            failures.append(Failure("answer", f"{one}; {int(wrong.sum())} of {wrong.size} differ"))
    return failures


def check_in_program(family: Family, row: Row, sanitizer: str, program: Program, mutant: int = 0) -> list[Failure]:
    """Run one combination in a program that ThreadSanitizer ("tsan") or AddressSanitizer ("asan") watches."""
    run = problem(family, row)
    if run.refused or row["alignment"] != 4:
        return []
    arrays = {**run.inputs, **run.updated, **{n: _poison(a) for n, a in {**run.outputs, **run.workspaces}.items()}}
    settings = {
        "schedule": SCHEDULES.index(row["schedule"]),
        "seed": 1,
        "late_copies": row.get("copies") != "early",
        "architecture": family.architecture,
        "mutant": mutant,
    }
    with tempfile.TemporaryDirectory() as folder:
        said, results = program.call(run.launcher, run.arguments, arrays, settings, Path(folder) / "call")
    if said:
        return [Failure(sanitizer, said)]
    return compare(run, results)
