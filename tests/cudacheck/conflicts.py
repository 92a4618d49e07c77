"""`python -m tests.cudacheck.conflicts`: bank conflicts of every access to shared memory, from the addresses of a simulated run.

Shared memory has 32 banks of 4 bytes, and answers a request of a warp in phases of at most 128 bytes; two words of one bank
take two phases. A kernel is run on a problem that fills a tile, so what is counted is its inner loop, not its edges.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass

import click

from tests.cudacheck.family import Family, execute, families, problem
from tests.cudacheck.mutants import describe
from tests.cudacheck.pairwise import Row

STATED: dict[str, tuple[int, ...]] = {
    # Of float64, a thread reads 32 bytes in two halves, 32 bytes from its neighbour's: half of the banks do the work.
    "conv small_c": (0, 3456, 0, 0, 0, 0, 0, 3456),
    "conv igemm_simt_64": (0, 23040, 0, 23040, 0, 30720),
    # Rows of 48 bytes are read without conflicts; on their way in, two lanes of eight meet in one bank.
    "conv igemm_async": (576, 1152, 0),
    "conv igemm_async_64": (1152, 2304, 0),
    "attention": (0, 37376, 0, 124928),  # of float64, as above
    # A block's sums, added up once at its end, lie in pairs: neighbours are two banks apart (of float64 four).
    "group_norm": (480, 960, 480, 960),
}
"""The conflicts of each of a family's typical runs; those of a family that is not here have none."""


@dataclass(frozen=True)
class Conflicts:
    """One place of a kernel's code that reads or writes shared memory.

    `where` is its line ("file:line", and its caller's where it is a helper's); of `requests` of `bytes` a thread each, the banks
    make `phases`, where `least` would do.
    """

    kernel: str
    where: str
    access: str
    bytes: int
    requests: int
    phases: int
    least: int

    @property
    def conflicts(self) -> int:
        return self.phases - self.least


def bank_conflicts(family: Family, row: Row) -> list[Conflicts]:
    """Every access to shared memory of one run, in the order of kernels and lines. Raises RuntimeError where the run fails."""
    settings = {"schedule": "forward", "architecture": family.architecture, "record": True}
    failures, _, _, requests = execute(family, problem(family, row), row["alignment"], settings)
    if failures:
        raise RuntimeError(f"{family.name}: {describe(row)}: {failures[0].check}: {failures[0].message}")
    found = [
        Conflicts(_name(r.kernel), " < ".join(filter(None, (r.where, r.caller))), r.access, r.bytes, r.requests, r.parts, r.least)
        for r in requests
        if r.space == "shared"
    ]
    return sorted(found, key=lambda c: (c.kernel, c.where, c.access, c.bytes))


def stated(family: Family) -> tuple[int, ...]:
    """How many conflicts each of the family's typical runs has."""
    return STATED.get(family.name, (0,) * len(family.typical))


def _name(kernel: str) -> str:
    """A kernel's name without the template arguments that its launcher wrote."""
    return re.match(r"\(?(\w+)", kernel)[1]  # type: ignore[index]


def differing(family: Family, row: Row) -> Row:
    """What of a run is not the same in all of the family's."""
    return {name: value for name, value in row.items() if any(other[name] != value for other in family.typical)}


@click.command()
@click.option("--family", "names", multiple=True, help="Only this family (may be given more than once).")
@click.option("--all", "everything", is_flag=True, help="Accesses without conflicts too.")
def main(names: tuple[str, ...], everything: bool) -> None:
    """Print the bank conflicts of each access to shared memory; fail where a run has others than stated."""
    known = families()
    if unknown := set(names) - set(known):
        raise click.BadParameter(f"no family {', '.join(unknown)}; there are: {', '.join(known)}")
    different = 0
    for family in (f for name, f in known.items() if f.typical and (not names or name in names)):
        common = {name: value for name, value in family.typical[0].items() if name not in differing(family, family.typical[0])}
        print(f"\n{family.name}: {describe(common)}")
        for row, expected in zip(family.typical, stated(family), strict=True):
            found = bank_conflicts(family, row)
            total, conflicts = sum(c.phases for c in found), sum(c.conflicts for c in found)
            remark = "" if conflicts == expected else f" (stated: {expected})"
            different += conflicts != expected
            print(f"  {describe(differing(family, row))}: {conflicts} conflicts in {total} phases{remark}")
            for c in found:
                if everything or c.conflicts:
                    places = f"{c.kernel:20} {c.where:44} {c.access:5} {c.bytes:2} bytes"
                    print(f"    {places} {c.requests:7} requests {c.phases:7} phases {c.conflicts:7} conflicts")
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
