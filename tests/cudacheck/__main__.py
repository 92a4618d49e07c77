"""`python -m tests.cudacheck`: every kernel on the simulator with every check, and every guard switched off in turn.

--fast is what CI runs on every change: the first rows of each family, and for each mutant the run that caught it last.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

import click

from tests.cudacheck.family import Failure, Family, check, check_in_program, families
from tests.cudacheck.launchers import compiled
from tests.cudacheck.mutants import TABLE, Caught, describe, hunt, mutants, read_table, write_table
from tests.cudacheck.pairwise import Row


def _check_rows(family: Family, rows: Sequence[Row]) -> list[tuple[Row, list[Failure]]]:
    return [(row, check(family, row)[0]) for row in rows]


def _check_programs(family: Family, rows: Sequence[Row]) -> list[tuple[Row, list[Failure]]]:
    failed = []
    for sanitizer in ("tsan", "asan"):
        program = family.program(sanitizer)
        failed += [(row, check_in_program(family, row, sanitizer, program)) for row in rows]
    return failed


def _child(connection: Connection, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    try:
        result = (function(*arguments), "")
    except Exception:
        result = (None, traceback.format_exc())
    connection.send(result)
    connection.close()


@dataclass(frozen=True)
class Done:
    """What became of a task: its result, or the exception it raised, or (both empty) the crash of its process."""

    name: str
    result: Any
    error: str

    @property
    def crashed(self) -> bool:
        return self.result is None and not self.error


def in_processes(tasks: Sequence[tuple[str, Callable[..., Any], Sequence[Any]]], workers: int) -> list[Done]:
    """Run (name, function, arguments) in processes of their own, so that a crash is one task's."""
    context = get_context("fork")
    waiting = list(tasks)
    running: dict[Any, tuple[str, Any]] = {}
    done = []
    while waiting or running:
        while waiting and len(running) < workers:
            name, function, arguments = waiting.pop(0)
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(theirs, function, arguments))
            process.start()
            theirs.close()
            running[ours] = (name, process)
        for connection in wait(list(running)):
            name, process = running.pop(connection)
            try:
                result, error = connection.recv()  # type: ignore[union-attr]
            except EOFError:
                result, error = None, ""
            process.join()
            done.append(Done(name, result, error))
    return done


def _batches(rows: Sequence[Row], size: int) -> list[Sequence[Row]]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


@click.command()
@click.option("--fast", is_flag=True, help="A part of it, in under five minutes on two processors.")
@click.option("--write", is_flag=True, help=f"Write {TABLE.name} anew.")
@click.option("--mutants", "only_mutants", is_flag=True, help="Only the mutants.")
@click.option("--family", "names", multiple=True, help="Only this family (may be given more than once).")
@click.option("--rows", default=12, show_default=True, help="How many rows of each family --fast runs.")
@click.option("--workers", default=os.cpu_count() or 1, show_default=True, help="How many processes.")
def main(fast: bool, write: bool, only_mutants: bool, names: tuple[str, ...], rows: int, workers: int) -> None:
    """Check the CUDA kernels on the simulator."""
    everything = families()
    if unknown := set(names) - set(everything):
        raise click.BadParameter(f"no family {', '.join(unknown)}; there are: {', '.join(everything)}")
    chosen = [f for name, f in everything.items() if not names or name in names]
    begin = time.perf_counter()
    for family in chosen:
        compiled(family.sources, "checked")
    print(f"built in {time.perf_counter() - begin:.0f} s")

    bad = 0
    tasks: list[tuple[str, Callable[..., Any], Sequence[Any]]] = []
    for family in [] if only_mutants else chosen:
        some = family.rows[:rows] if fast else family.rows
        tasks += [(family.name, _check_rows, (family, batch)) for batch in _batches(some, 4)]
        sanitized = [row for row in family.rows if row["alignment"] == 4][: 2 if fast else None]
        tasks.append((f"{family.name} under sanitizers", _check_programs, (family, sanitized)))
    counts: dict[str, int] = {}
    for done in in_processes(tasks, workers):
        if done.result is None:
            bad += 1
            print(f"FAILED {done.name}: {done.error or 'the process crashed'}")
        for row, failures in done.result or []:
            counts[done.name] = counts.get(done.name, 0) + 1
            if failures:
                bad += 1
                print(f"FAILED {done.name}: {describe(row)}")
                for failure in failures[:3]:
                    print(f"    {failure.check}: {failure.message}")
    for name in sorted(counts):
        print(f"{name}: {counts[name]} runs")

    found = mutants(chosen)
    known = read_table(found)
    hunts = [(str(m.number), hunt, (m, chosen, known.get(m.number), not fast)) for m in found]
    hunted = {int(done.name): done for done in in_processes(hunts, workers)}
    caught = []
    for m in found:
        done = hunted[m.number]
        if done.error:
            bad += 1
            print(f"FAILED mutant {m.number}: {done.error}")
        caught.append(Caught(m, "crash", "", "") if done.crashed else done.result or Caught(m, "", "", ""))
    print(f"\n{len(found)} mutants:")
    for c in caught:
        print(f"{c.mutant.number:5} {c.mutant.place}: {c.mutant.what}: {c.check or 'NOT CAUGHT'}")
        bad += not c.check
    if write and not names:
        write_table(caught)
    elif stale := [c.mutant.number for c in caught if c.mutant.number not in known]:
        bad += 1
        print(f"{TABLE.name} lacks the mutants {stale}: run python -m tests.cudacheck --write")
    print(f"{time.perf_counter() - begin:.0f} s; {bad or 'nothing'} failed")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
