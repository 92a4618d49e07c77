"""The guards of the kernels, and proof that each is needed: MUTANT(number, "what it breaks") switches one off."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.cudacheck.family import Family, check
from tests.cudacheck.pairwise import Row
from tinydiff.cudasim.build import csrc

TABLE = Path(__file__).parent / "mutants.md"
_MUTANT = re.compile(r"\bMUTANT\s*\(\s*(\d+)\s*,\s*((?:\"(?:[^\"\\]|\\.)*\"\s*)+)\)")
_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)


@dataclass(frozen=True)
class Mutant:
    number: int
    what: str
    file: Path

    @property
    def place(self) -> str:
        return self.file.name


@dataclass(frozen=True)
class Caught:
    """Which check caught a mutant, in which run of which family; `check` is empty if none did."""

    mutant: Mutant
    check: str
    family: str
    row: str

    def line(self) -> str:
        return f"| {self.mutant.number} | {self.mutant.place} | {self.mutant.what} | {self.check} | {self.family} | {self.row} |"


def files(family: Family) -> list[Path]:
    """A family's own sources and all they include, the launch header and the simulator left out."""
    found: dict[Path, None] = {}
    todo = list(family.own or family.sources)
    while todo:
        path = todo.pop().resolve()
        if path in found or path.name == "launch.h":
            continue
        found[path] = None
        for name in _INCLUDE.findall(path.read_text()):
            todo += [p for p in (path.parent / name, csrc() / name) if p.exists()][:1]
    return list(found)


def mutants(families: Iterable[Family]) -> list[Mutant]:
    """All mutants of some families by number. Raises ValueError for a number that is used twice or left out."""
    found: dict[int, Mutant] = {}
    for path in dict.fromkeys(path for family in families for path in files(family)):
        for number, texts in _MUTANT.findall(path.read_text()):
            mutant = Mutant(int(number), "".join(re.findall(r'"((?:[^"\\]|\\.)*)"', texts)), path)
            if mutant.number == 0 or mutant.number in found:
                raise ValueError(f"mutant {number} of {path.name} needs a number of its own")
            found[mutant.number] = mutant
    return [found[number] for number in sorted(found)]


def describe(row: Row) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in row.items())


def hunt(mutant: Mutant, families: Sequence[Family], known: Caught | None, search: bool) -> Caught:
    """Find a check that fails with this guard switched off: where one did last time, else (`search`) in any run."""
    having = [family for family in families if mutant.file in files(family)]
    trials = [(family, row) for family in having for row in family.rows]
    if known is not None:  # stable, so the rest keeps its order
        trials.sort(key=lambda trial: (trial[0].name, describe(trial[1])) != (known.family, known.row))
        if not search:
            trials = trials[:1]
    for family, row in trials:
        failures, hits = check(family, row, mutant.number)
        if failures and hits:
            return Caught(mutant, failures[0].check, family.name, describe(row))
    return Caught(mutant, "", "", "")


_HEADER = """# Which check catches which mutant

Every guard of the CUDA kernels can be switched off by its number, and then some check must fail. Written by
`python -m tests.cudacheck --write`; `python -m tests.cudacheck --fast` runs each line again.

| number | file | what it breaks | caught by | family | run |
|---|---|---|---|---|---|
"""


def write_table(caught: Iterable[Caught]) -> None:
    TABLE.write_text(_HEADER + "".join(c.line() + "\n" for c in sorted(caught, key=lambda c: c.mutant.number)))


def read_table(found: Sequence[Mutant]) -> dict[int, Caught]:
    """What the table says of the mutants there are."""
    by_number = {mutant.number: mutant for mutant in found}
    known: dict[int, Caught] = {}
    for line in TABLE.read_text().splitlines() if TABLE.exists() else []:
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if len(cells) == 6 and cells[0].isdigit() and int(cells[0]) in by_number:
            known[int(cells[0])] = Caught(by_number[int(cells[0])], cells[3], cells[4], cells[5])
    return known
