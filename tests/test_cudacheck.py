"""The frame of `python -m tests.cudacheck`, on its own example: it passes what is right and notices each mistake."""

import itertools
import shutil

import numpy as np
import pytest
from click.testing import CliRunner

from tests.cudacheck import __main__ as command
from tests.cudacheck import conflicts, mutants
from tests.cudacheck import family as frame
from tests.cudacheck.pairwise import pairwise

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


FAMILIES = frame.families()


@pytest.fixture(scope="module")
def example():
    return frame.families()["example"]


def test_every_two_values_meet():
    axes = {"a": (1, 2, 3), "b": "xyz", "c": (True, False), "d": range(4)}
    rows = pairwise(axes, lambda row: not (row["a"] == 3 and row["b"] == "z"))
    assert len(rows) < 3 * 3 * 2 * 4 / 3
    for (a, values), (b, others) in itertools.combinations(axes.items(), 2):
        for pair in itertools.product(values, others):
            met = any((row[a], row[b]) == pair for row in rows)
            assert met == ((a, b, *pair) != ("a", "b", 3, "z")), (a, b, pair)


def test_right_kernels_pass(example):
    for row in example.rows[:8]:
        assert frame.check(example, row) == ([], 0)


EXPECTED = {1: "bounds", 2: "bounds", 3: "answer", 4: "async", 5: "race", 6: "bounds"}


@pytest.mark.parametrize("number", EXPECTED)
def test_every_guard_is_needed(example, number):
    """Each mutant makes its own check fail, in some row, and was reached there."""
    found = {}
    for row in example.rows:
        failures, hits = frame.check(example, row, number)
        assert hits or not failures
        found.update({f.check: f.message for f in failures})
    assert EXPECTED[number] in found


def test_mutants_are_read_from_the_sources(example):
    found = mutants.mutants([example])
    assert [m.number for m in found] == list(EXPECTED)
    assert found[4].what == "other threads' copies are not waited for"


def test_a_guard_that_nothing_needs_is_reported(example):
    useless = mutants.Mutant(999, "nothing: no source has this number", example.sources[0])
    assert mutants.hunt(useless, [example], None, True).check == ""


def test_a_wrong_answer_and_nan_are_noticed():
    run = frame.Run("f", [], {}, {}, {"y": (np.array([1.0, 2.0]), np.array([0.1, 0.2]))})
    assert frame.compare(run, {"y": np.array([1.05, 2.15])}) == []
    assert "y[1] is 2.25, not 2" in frame.compare(run, {"y": np.array([1.0, 2.25])})[0].message
    assert frame.compare(run, {"y": np.array([np.nan, 2.0])})


ROW = {"n": 200, "radius": 5, "alignment": 4, "schedule": "forward", "copies": "late"}


@pytest.mark.parametrize(
    ("sanitizer", "number", "says"),
    [("tsan", 5, ["data race", "example.cu"]), ("asan", 6, ["heap-buffer-overflow", "example.cu"])],
)
def test_the_compilers_own_sanitizers(example, sanitizer, number, says):
    program = example.program(sanitizer)
    assert frame.check_in_program(example, ROW, sanitizer, program) == []
    (failure,) = frame.check_in_program(example, ROW, sanitizer, program, number)
    assert failure.check == sanitizer
    for text in says:
        assert text in failure.message


def _crash():
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)


def _raise():
    raise ValueError("no such thing")


def test_tasks_that_crash_or_raise():
    done = {d.name: d for d in command.in_processes([("a", _crash, ()), ("b", _raise, ()), ("c", len, ("xy",))], 2)}
    assert done["a"].crashed
    assert "no such thing" in done["b"].error and not done["b"].crashed
    assert done["c"].result == 2


def test_the_command_fails_when_a_check_does(monkeypatch):
    monkeypatch.setattr(command, "_check_rows", lambda family, rows: [(rows[0], [frame.Failure("answer", "planted")])])
    monkeypatch.setattr(command, "_check_programs", lambda family, rows: [])
    result = CliRunner().invoke(command.main, ["--fast", "--family", "example", "--workers", "1"])
    assert result.exit_code == 1
    assert "answer: planted" in result.output


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.typical])
def test_bank_conflicts_are_as_stated(name):
    """In tiles that are full, so that the inner loops of float32 and of the tensor cores have none at all."""
    family = FAMILIES[name]
    for row, expected in zip(family.typical, conflicts.stated(family), strict=True):
        found = conflicts.bank_conflicts(family, row)
        assert sum(c.conflicts for c in found) == expected, conflicts.differing(family, row)
        if name.startswith("conv igemm"):
            assert {"read", "write"} == {c.access for c in found}
        if name.startswith(("conv igemm", "attention")):
            assert row["precision"] == "float64" or not any(c.conflicts for c in found if c.access == "read")
