"""`python -m tests.cudacheck.figures`: what can be known of the GPU kernels' speed without a GPU, held against figures.md.

NVIDIA's compiler, from the packages of the extra `cuda-build`, compiles csrc/, and nvdisasm shows the machine code. Bank
conflicts, which depend on addresses, are counted by conflicts.py.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path

import click

from tests.cudacheck import sass, toolchain
from tests.cudacheck.occupancy import LIMITS, occupancy
from tinydiff.cudasim.build import csrc

TABLE = Path(__file__).parent / "figures.md"
CHECKED = ("80",)  # what is compiled unless other architectures are named


@dataclass(frozen=True)
class Figures:
    """One kernel on one architecture.

    Registers a thread; bytes of spills, of local and of shared memory; threads of a block; occupancy in percent; and the
    hottest loop's mix, as sass.describe writes it.
    """

    kernel: str
    sm: str
    registers: int
    spills: int
    local: int
    shared: int
    threads: int
    occupancy: int
    loop: str

    def count(self, kind: str) -> int:
        """How many instructions of a kind the loop has: "LDG.128", or "LDG" for all its widths."""
        return sum(int(n) for n, name in re.findall(r"(\d+) ([\w.]+)", self.loop) if kind in (name, name.split(".")[0]))

    def share(self, kind: str) -> float:
        """The part of the loop's instructions that are of this kind."""
        return self.count(kind) / max(int(self.loop.partition(":")[0] or 0), 1)


# What must hold.


ALL = tuple(LIMITS)
SINCE_80 = ALL[1:]  # tensor cores for TF32 and bfloat16, cp.async, more than 64 KB of shared memory for a block


@dataclass(frozen=True)
class Promise:
    """What kernels whose name matches `pattern` promise on architectures `on`; `why`, where it is less than one wishes."""

    pattern: str
    what: str
    holds: Callable[[Figures], bool]
    on: Sequence[str] = ALL
    why: str = ""

    def line(self) -> str:
        where = "" if self.on == ALL else f" (sm_{', '.join(self.on)})"
        return f"- `{self.pattern}`: {self.what}{where}{'; ' if self.why else ''}{self.why}."


def _share(kind: str, percent: int, pattern: str, on: Sequence[str] = ALL, why: str = "") -> Promise:
    what = f"{kind} is at least {percent} % of the hottest loop"
    return Promise(pattern, what, lambda f: f.share(kind) >= percent / 100, on, why)


def _wide(kind: str, what: str, pattern: str, on: Sequence[str] = ALL) -> Promise:
    return Promise(pattern, f"{what} move 16 bytes each", lambda f: f.count(f"{kind}.128") == f.count(kind) > 0, on)


LARGE, SMALL = "Tile<128, 128, 8, 8, 8>", "Tile<64, 64, 8, 4, 16>"
PRODUCTS = "(igemm_simt<float, |wino_products<)"
LARGEST_HEADS = "attention_gradient<(float, Tile<float, 128|double, Tile<double, 64), .*"
QUARTER = "a tile of 64 x 64 has a quarter of the multiplications for as many addresses"
SINGLE = (
    "a step's 16 numbers a thread, fetched one by one, take 64 instructions (guard, zero, load, store) beside 512 FFMA and 48 "
    "reads of shared memory: 82 % before their addresses"
)
PROMISES = (
    Promise(".*", "no register is spilled", lambda f: f.spills == 0),
    Promise(".*", "nothing lies in local memory", lambda f: f.local == 0),
    Promise(".*", "the block's size is declared (KERNEL_BOUNDS)", lambda f: f.threads > 0),
    Promise(f"(?!{LARGEST_HEADS}).*", "a block fits a multiprocessor", lambda f: f.occupancy > 0),
    Promise(LARGEST_HEADS, "a block fits a multiprocessor", lambda f: f.occupancy > 0, SINCE_80, "sm_75 is given smaller heads"),
    _share("FFMA", 80, f"(igemm_simt<float, ({LARGE}|{SMALL})|wino_products<{LARGE}), true.*"),
    _share("FFMA", 79, f"wino_products<{SMALL}, true>", why="81 or 82 but on sm_90, where addresses take more instructions"),
    _share("FFMA", 79, f"{PRODUCTS}{LARGE}, false.*", why="numbers at any address are fetched one by one, each behind a guard"),
    _share("FFMA", 65, f"{PRODUCTS}{SMALL}, false.*", why=SINGLE),
    _share("FFMA", 80, f"igemm_async<({LARGE}|{SMALL}), .>", SINCE_80),
    _share("FFMA", 75, "attention_(rows|gradient)<float, .*"),
    _share("HMMA", 25, "igemm_tc<(float|unsigned short), 128, [01]>", SINCE_80),
    _share("HMMA", 15, "igemm_tc<(float|unsigned short), 64, 0>", SINCE_80, QUARTER),
    _wide("LDG", "the loop's loads from global memory", "(igemm_simt|wino_products)<.*, true.*"),
    _wide("LDGSTS", "the loop's copies to shared memory", "igemm_(async|tc)<.*", SINCE_80),
)


def broken(figures: Iterable[Figures], promises: Sequence[Promise] = PROMISES) -> list[str]:
    """A line for each promise that is not kept, and for each that no kernel gives."""
    figures = list(figures)
    said = []
    for promise in promises:
        meant = [f for f in figures if re.fullmatch(promise.pattern, f.kernel)]
        if not meant:
            said.append(f"{promise.pattern}: there is no such kernel, which should promise: {promise.what}")
        for f in meant:
            if f.sm in promise.on and not promise.holds(f):
                said.append(f"{f.kernel} on sm_{f.sm}: not so: {promise.what} ({f})")
    return said


# From the sources.


def sources() -> list[Path]:
    return [path for path in sorted(csrc().glob("*.cu")) if "KERNEL" in path.read_text()]


def names(symbols: Sequence[str]) -> list[str]:
    """Kernels as they are written, without results and parameters: igemm_tc<float, 128, 0>."""
    shown = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True).stdout.splitlines()
    return [re.sub(r"^void |\(.*\)$", "", name).replace("> >", ">>") for name in shown]


def _of(source: Path, sm: str) -> list[Figures]:
    compiled = toolchain.compile_for(source, sm)
    code = sass.functions(toolchain.disassemble(compiled.cubin))
    found = []
    for name, (symbol, r) in zip(names(list(compiled.resources)), compiled.resources.items(), strict=True):
        filled = round(100 * occupancy(sm, r.threads or 1024, r.registers, r.shared))
        loop = sass.describe(sass.hottest(sass.loops(*code[symbol])))
        found.append(Figures(name, sm, r.registers, r.spills, r.local, r.shared, r.threads, filled, loop))
    return found


def compute(architectures: Sequence[str]) -> list[Figures]:
    """All kernels for these architectures. A kernel that several sources have (splitk_reduce) is one."""
    jobs = [(path, sm) for sm in architectures for path in sources()]
    with (
        ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool,
        click.progressbar(pool.map(lambda job: _of(*job), jobs), length=len(jobs), label="Compiling") as parts,
    ):
        unique = {(f.kernel, int(f.sm)): f for part in parts for f in part}
    return [unique[key] for key in sorted(unique)]


# The table.

_INTRODUCTION = """\
# What nvcc makes of the kernels

Written by `python -m tests.cudacheck.figures --write` with nvcc {version}. Of each kernel for each architecture: registers a
thread; bytes of spills, of local and of shared memory (small_c's filters, whose size only the launch knows, are left out);
threads of a block; the part of a multiprocessor's warps that run at once, in percent; and the instructions of the hottest loop
by a static guess, without those of loops inside it. LDGSTS is cp.async, LDSM ldmatrix, HMMA mma on the tensor cores, NOP what
ptxas puts between for the hardware's sake.

What must hold:

"""


def table(figures: Iterable[Figures]) -> str:
    columns = [f.name for f in fields(Figures)]
    rows = [columns, ["---"] * len(columns), *([str(getattr(f, name)) for name in columns] for f in figures)]
    promises = "\n".join(promise.line() for promise in PROMISES)
    return _INTRODUCTION.format(version=toolchain.version()) + promises + "\n\n" + "".join(f"| {' | '.join(r)} |\n" for r in rows)


def read(text: str) -> tuple[str, list[Figures]]:
    """The version of nvcc that a table is of, and its rows."""
    rows = []
    for line in text.splitlines():
        cells = line.removeprefix("| ").removesuffix(" |").split(" | ")
        if len(cells) == len(fields(Figures)) and cells[1].isdigit():
            kernel, sm, *numbers, loop = cells
            rows.append(Figures(kernel, sm, *map(int, numbers), loop))
    return re.search(r"nvcc (\d[\d.]*\d)", text)[1], rows  # type: ignore[index]


def differences(found: Sequence[Figures], stored: Sequence[Figures]) -> list[str]:
    """A line for each figure that is not as stored, of the architectures that were compiled."""
    architectures = {f.sm for f in found}
    before = {(f.kernel, f.sm): f for f in stored if f.sm in architectures}
    now = {(f.kernel, f.sm): f for f in found}
    said = [f"{kernel} on sm_{sm} is not in the table" for kernel, sm in now.keys() - before.keys()]
    said += [f"{kernel} on sm_{sm} is in the table only" for kernel, sm in before.keys() - now.keys()]
    for kernel, sm in now.keys() & before.keys():
        for field in fields(Figures):
            a, b = (getattr(side[kernel, sm], field.name) for side in (before, now))
            said += [f"{kernel} on sm_{sm}: {field.name} was {a}, and is {b}"] if a != b else []
    return sorted(said)


@click.command(help=__doc__)
@click.option("--write", is_flag=True, help=f"Compile for all architectures and write {TABLE.name} anew.")
@click.option("--sm", "architectures", multiple=True, type=click.Choice(list(LIMITS)), help=f"By default {', '.join(CHECKED)}.")
def main(write: bool, architectures: tuple[str, ...]) -> None:
    architectures = tuple(LIMITS) if write else architectures or CHECKED
    try:
        version = toolchain.version()
        found = compute(architectures)
    except (toolchain.Missing, RuntimeError) as error:
        raise click.ClickException(str(error)) from None
    said = broken(found)
    if write:
        TABLE.write_text(table(found))
    else:
        of, stored = read(TABLE.read_text())
        if of != version:
            raise click.ClickException(f"{TABLE.name} is of nvcc {of}, and here is {version}: pip install '.[cuda-build]'")
        said += differences(found, stored)
    for line in said:
        print(line)
    kernels = len({f.kernel for f in found})
    print(f"nvcc {version}: {kernels} kernels for sm_{', '.join(architectures)}; {len(said) or 'nothing'} amiss")
    if said:
        raise click.ClickException("where a figure may change, write the table anew (--write)")


if __name__ == "__main__":
    main()
